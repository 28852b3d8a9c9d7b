// Peak memory of the loss at a real vocabulary: what the resident set of this process grew by at its peak.
#include <algorithm>
#include <catch2/catch.hpp>
#include <fstream>
#include <string>

#include "core/distill/head_loss.h"
#include "kernels/backends.h"
#include "test/support/tiny_models.h"

using namespace distill;
using namespace distill::test;

namespace {

// From here on the peak resident set is what it is now.
void forget_peak() { REQUIRE(std::ofstream("/proc/self/clear_refs") << "5\n" << std::flush); }

// Peak resident set of this process in bytes.
std::int64_t peak_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("VmHWM:")) return std::stoll(line.substr(6)) * 1024;
  throw std::runtime_error("no VmHWM in /proc/self/status");
}

// One chunk of teacher logits, given again and again: what a ring of one slot holds.
class OneSlotTeacher : public TeacherSource {
 public:
  OneSlotTeacher(Device& device, std::int64_t positions, std::int64_t columns, DType dtype)
      : slot_(device.tensor(positions, columns, dtype)) {
    device.fill_normal(slot_.view(), 3, 0, 0, 2.0f);
  }
  void begin(const MicroBatch&) override {}
  ConstView acquire(std::int64_t positions) override { return slot_.view().row_slice(0, positions); }
  void release() override {}
  double seconds_waited() const override { return 0; }

 private:
  Tensor slot_;
};

}  // namespace

TEST_CASE("8,192 supervised positions at 151,936 columns stay below 1 GB, fewer below their logits", "[head_loss]") {
  struct Case {
    std::int64_t positions;
    DType dtype;
    Objective objective;
    int topk;
  };
  const Case c = GENERATE(
      Case{8192, DType::bf16, Objective::forward_kl, 0}, Case{1024, DType::f32, Objective::forward_kl, 0},
      Case{1024, DType::bf16, Objective::js_divergence, 0}, Case{1024, DType::f32, Objective::adaptive_kl, 64});
  CAPTURE(c.positions, name_of(c.dtype), objective_names[std::size_t(c.objective)], c.topk);
  const std::int64_t vocabulary = 151936, chunk = default_logits_chunk(vocabulary, c.dtype);
  const auto device = make_cpu_device(2);
  ModelSpec spec = tiny_spec("qwen2", true);
  spec.vocabulary = vocabulary;
  Transformer model(*device, spec, c.dtype, {.tokens = 1, .supervised = 1, .longest = 1, .trains = true});
  randomise(*device, model, 1);
  Tensor hidden = device->tensor(c.positions, spec.hidden, c.dtype),
         labels = device->tensor(1, c.positions, DType::i32);
  device->fill_normal(hidden.view(), 2, 0, 0, 1.0f);
  device->zero(labels.view());
  OneSlotTeacher teacher(*device, chunk, vocabulary, c.dtype);
  LossSpec loss;
  loss.objective = c.objective;
  loss.topk = c.topk;
  loss.vocabulary = vocabulary;

  forget_peak();
  const std::int64_t before = peak_bytes();
  HeadLoss head(*device, model, loss, chunk, c.positions);
  head.forward_backward(hidden.view(), labels.view(), &teacher, 1.0 / double(c.positions));
  CHECK(head.take_sums()[LossTerms::cross_entropy] > 0);
  const std::int64_t used = peak_bytes() - before;
  const std::int64_t whole = c.positions * vocabulary * 4;
  INFO(used << " bytes above weights, gradients and the slot; whole logits would take " << whole);
  CHECK(used < std::min<std::int64_t>(1'000'000'000, whole));
}
