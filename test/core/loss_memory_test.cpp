// Peak memory of the loss at a real vocabulary: resident set before and after, of this process alone.
#include <catch2/catch.hpp>
#include <fstream>
#include <string>

#include "core/distill/head_loss.h"
#include "kernels/backends.h"
#include "test/support/tiny_models.h"

using namespace distill;
using namespace distill::test;

namespace {

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
  OneSlotTeacher(Device& device, std::int64_t positions, std::int64_t columns)
      : slot_(device.tensor(positions, columns, DType::bf16)) {
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

TEST_CASE("8,192 supervised positions at 151,936 columns stay below 1 GB", "[head_loss]") {
  const std::int64_t positions = 8192, vocabulary = 151936, chunk = default_logits_chunk(vocabulary, DType::bf16);
  const auto device = make_cpu_device(2);
  ModelSpec spec = tiny_spec("qwen2", true);
  spec.vocabulary = vocabulary;
  Transformer model(*device, spec, DType::bf16, {.tokens = 1, .supervised = 1, .longest = 1, .trains = true});
  randomise(*device, model, 1);
  Tensor hidden = device->tensor(positions, spec.hidden, DType::bf16),
         labels = device->tensor(1, positions, DType::i32);
  device->fill_normal(hidden.view(), 2, 0, 0, 1.0f);
  device->zero(labels.view());
  OneSlotTeacher teacher(*device, chunk, vocabulary);
  LossSpec loss;
  loss.vocabulary = vocabulary;

  const std::int64_t before = peak_bytes();
  HeadLoss head(*device, model, loss, chunk, positions);
  head.forward_backward(hidden.view(), labels.view(), &teacher, 1.0 / double(positions));
  CHECK(head.take_sums()[LossTerms::cross_entropy] > 0);
  const std::int64_t used = peak_bytes() - before;
  INFO(used << " bytes above weights, gradients and the slot; whole logits would take " << positions * vocabulary * 4);
  CHECK(used < 1'000'000'000);
}
