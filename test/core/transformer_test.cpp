// The hand-written backward against finite differences in f64; recomputation and padding against the plain run.
#include "core/model/transformer.h"

#include <catch2/catch.hpp>
#include <cmath>

#include "core/distill/head_loss.h"
#include "kernels/backends.h"
#include "test/support/tiny_models.h"

using namespace distill;
using namespace distill::test;

namespace {

constexpr int real_vocabulary = 37;

LossSpec plain_loss() {
  LossSpec spec;
  spec.distill_weight = 0;
  spec.vocabulary = real_vocabulary;
  return spec;
}

// Mean cross-entropy of the batch and, on request, its gradient.
double loss(Device& device, Transformer& model, const MicroBatch& micro, bool with_gradient) {
  BatchOnDevice batch(device, std::int64_t(micro.tokens.size()), std::int64_t(micro.supervised.size()));
  HeadLoss head(device, model, plain_loss(), /*chunk=*/4, std::int64_t(micro.supervised.size()));
  batch.upload(micro);
  const View hidden = model.forward(batch.batch());
  const double count = double(micro.supervised.size());
  if (with_gradient) {
    device.zero(model.gradients());
    model.backward(batch.batch(), head.forward_backward(hidden, batch.labels(), nullptr, 1 / count));
  } else {
    head.forward(hidden, batch.labels(), nullptr);
  }
  return head.take_sums()[LossTerms::cross_entropy] / count;
}

struct Family {
  std::string name;
  bool tied;
};

}  // namespace

TEST_CASE("every parameter's gradient is the derivative of the loss", "[transformer]") {
  const Family family = GENERATE(Family{"qwen2", true}, Family{"qwen2", false}, Family{"qwen3", true},
                                 Family{"llama", false}, Family{"mistral", false});
  CAPTURE(family.name, family.tied);
  const auto device = make_cpu_device(1);
  const Samples samples = random_samples(5, real_vocabulary, 7);
  const MicroBatch micro = assemble(samples, all_indices(samples), Layout::packed);
  Transformer model(*device, tiny_spec(family.name, family.tied), DType::f64, limits_of(micro));
  randomise(*device, model, 11);
  loss(*device, model, micro, true);
  const auto gradients = download<double>(*device, model.gradients());
  const auto values = download<double>(*device, model.values());

  for (const Param& p : model.table().all()) {
    CAPTURE(p.name);
    // Along a random direction that touches this parameter only.
    std::mt19937 random(unsigned(p.offset) + 1);
    std::normal_distribution<double> normal;
    std::vector<double> direction(values.size(), 0.0);
    double expected = 0, gradient_norm = 0;
    for (std::int64_t i = p.offset; i < p.offset + p.size(); ++i) {
      direction[std::size_t(i)] = normal(random);
      expected += direction[std::size_t(i)] * gradients[std::size_t(i)];
      gradient_norm += gradients[std::size_t(i)] * gradients[std::size_t(i)];
    }
    REQUIRE(gradient_norm > 0);
    const double step = 1e-5;
    const auto moved = [&](double by) {
      auto shifted = values;
      for (std::size_t i = 0; i < shifted.size(); ++i) shifted[i] += by * direction[i];
      device->upload(model.values(), shifted.data());
      return loss(*device, model, micro, false);
    };
    // Fourth-order central difference: error O(step⁴) plus rounding 1e-16 / step.
    const double difference = (8 * (moved(step) - moved(-step)) - (moved(2 * step) - moved(-2 * step))) / (12 * step);
    CHECK(std::abs(difference - expected) < 1e-7 * std::sqrt(gradient_norm) * std::sqrt(double(p.size())) + 1e-10);
  }
}

TEST_CASE("recomputation gives the same bits as keeping every activation, in less memory", "[transformer]") {
  const std::string family = GENERATE("qwen2", "qwen3", "mistral");
  const DType dtype = GENERATE(DType::f32, DType::bf16, DType::f16);
  CAPTURE(family, name_of(dtype));
  const auto device = make_cpu_device(2);
  const Samples samples = random_samples(6, real_vocabulary, 3);
  const MicroBatch micro = assemble(samples, all_indices(samples), Layout::packed);
  std::size_t bytes = 0;
  const auto gradients = [&](Recompute recompute) {
    Transformer model(*device, tiny_spec(family, true), dtype, limits_of(micro, recompute));
    bytes = model.activation_bytes();
    randomise(*device, model, 5);
    loss(*device, model, micro, true);
    return download<float>(*device, model.gradients());
  };
  const auto kept = gradients(Recompute::none);
  for (const Recompute recompute : {Recompute::selective, Recompute::full}) {
    CAPTURE(int(recompute));
    const std::size_t bytes_before = bytes;
    CHECK(gradients(recompute) == kept);
    CHECK(bytes < bytes_before);
  }
}

TEST_CASE("padded and packed micro-batches give the same loss and gradient", "[transformer]") {
  const std::string family = GENERATE("qwen2", "mistral");
  const auto device = make_cpu_device(1);
  const Samples samples = random_samples(6, real_vocabulary, 9);
  const auto run = [&](Layout layout) {
    const MicroBatch micro = assemble(samples, all_indices(samples), layout);
    Transformer model(*device, tiny_spec(family, true), DType::f64, limits_of(micro));
    randomise(*device, model, 5);
    const double value = loss(*device, model, micro, true);
    return std::pair(value, download<double>(*device, model.gradients()));
  };
  const auto [packed_loss, packed] = run(Layout::packed);
  const auto [padded_loss, padded] = run(Layout::padded);
  CHECK(padded_loss == Approx(packed_loss).epsilon(1e-13));
  double largest = 0, difference = 0;
  for (std::size_t i = 0; i < packed.size(); ++i) {
    largest = std::max(largest, std::abs(packed[i]));
    difference = std::max(difference, std::abs(packed[i] - padded[i]));
  }
  CHECK(difference < 1e-13 * largest * 100);
}

TEST_CASE("a micro-batch beyond the planned size is refused with the numbers", "[transformer]") {
  const auto device = make_cpu_device(1);
  const Samples samples = random_samples(3, real_vocabulary, 1);
  const MicroBatch micro = assemble(samples, all_indices(samples), Layout::packed);
  auto limits = limits_of(micro);
  --limits.tokens;
  Transformer model(*device, tiny_spec("qwen2", true), DType::f32, limits);
  CHECK_THROWS_WITH(loss(*device, model, micro, false),
                    Catch::Contains(text("micro-batch of ", micro.tokens.size(), " tokens")));
}
