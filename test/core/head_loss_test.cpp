// The output head fused with the loss: the chunk changes nothing but memory.
#include "core/distill/head_loss.h"

#include <catch2/catch.hpp>
#include <cmath>

#include "kernels/backends.h"
#include "test/support/tiny_models.h"

using namespace distill;
using namespace distill::test;

namespace {

// Random teacher logits of the same positions, whatever the chunks.
class FixedTeacher : public TeacherSource {
 public:
  FixedTeacher(Device& device, std::int64_t positions, std::int64_t columns, DType dtype)
      : logits_(device.tensor(positions, columns, dtype)) {
    device.fill_normal(logits_.view(), 3, 0, 0, 2.0f);
  }
  void begin(const MicroBatch&) override { next_ = 0; }
  ConstView acquire(std::int64_t positions) override {
    next_ += positions;
    return logits_.view().row_slice(next_ - positions, positions);
  }
  void release() override {}
  double seconds_waited() const override { return 0; }

 private:
  Tensor logits_;
  std::int64_t next_ = 0;
};

struct Result {
  LossSums sums;
  std::vector<double> dhidden, dhead;
};

Result run(std::int64_t chunk) {
  const std::int64_t positions = 23;
  const auto device = make_cpu_device(1);
  const ModelSpec spec = tiny_spec("qwen2", false);
  Transformer model(*device, spec, DType::f64, {.tokens = 1, .supervised = 1, .longest = 1, .trains = true});
  randomise(*device, model, 1);
  LossSpec loss;
  loss.vocabulary = 37;
  HeadLoss head(*device, model, loss, chunk, positions);
  Tensor hidden = device->tensor(positions, spec.hidden, DType::f64), labels = device->tensor(1, positions, DType::i32);
  device->fill_normal(hidden.view(), 2, 0, 0, 1.0f);
  std::vector<std::int32_t> ids;
  for (int i = 0; i < positions; ++i) ids.push_back(i * 5 % 37);
  device->upload(labels.view(), ids.data());
  FixedTeacher teacher(*device, positions, 37, DType::f64);
  teacher.begin({});
  const ConstView dhidden = head.forward_backward(hidden.view(), labels.view(), &teacher, 1.0 / positions);
  return {head.take_sums(), download<double>(*device, dhidden), download<double>(*device, model.head_gradient(37))};
}

double distance(const std::vector<double>& a, const std::vector<double>& b) {
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::abs(a[i] - b[i]));
  return largest;
}

}  // namespace

TEST_CASE("the chunk size does not change loss and gradients", "[head_loss]") {
  const Result whole = run(23);
  CHECK(whole.sums[LossTerms::cross_entropy] > 0);
  CHECK(whole.sums[LossTerms::divergence] > 0);
  for (const std::int64_t chunk : {1, 4, 8, 22, 64}) {
    CAPTURE(chunk);
    const Result cut = run(chunk);
    for (int i = 0; i < LossTerms::count; ++i)
      CHECK(cut.sums[std::size_t(i)] == Approx(whole.sums[std::size_t(i)]).epsilon(1e-13));
    CHECK(distance(cut.dhidden, whole.dhidden) < 1e-14);
    CHECK(distance(cut.dhead, whole.dhead) < 1e-13);
  }
}

TEST_CASE("the default chunk keeps logits and their gradient within 384 MiB and 512 positions", "[head_loss]") {
  CHECK(default_logits_chunk(4096, DType::bf16) == 512);
  for (const std::int64_t columns : {32000, 128256, 151680, 256000})
    for (const DType dtype : {DType::bf16, DType::f32}) {
      const std::int64_t chunk = default_logits_chunk(columns, dtype);
      CHECK(chunk % 64 == 0);
      CHECK(chunk >= 128);
      CHECK(chunk * columns * std::int64_t(4 + size_of(dtype)) <= 384ll << 20);
    }
}
