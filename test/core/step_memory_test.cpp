// A step keeps no memory that the first ones did not: what malloc has handed out stays the same to the byte.
#include <malloc.h>
#include <catch2/catch.hpp>
#include <cmath>

#include "core/distill/head_loss.h"
#include "core/optim/optimizer.h"
#include "kernels/backends.h"
#include "test/support/tiny_models.h"

using namespace distill;
using namespace distill::test;

TEST_CASE("forward, loss, backward and update allocate nothing after the first step", "[memory]") {
  const DType dtype = GENERATE(DType::f32, DType::bf16, DType::f16);
  const std::string family = GENERATE("qwen2", "qwen3");
  CAPTURE(name_of(dtype), family);
  const auto device =
      make_cpu_device(1);  // with more, a thread may get its first work, and its scratch, in a later step
  const Samples samples = random_samples(6, 37, 1);
  const MicroBatch micro = assemble(samples, all_indices(samples), Layout::packed);
  Transformer model(*device, tiny_spec(family, true), dtype, limits_of(micro, Recompute::full));
  randomise(*device, model, 1, 0.1f);
  Optimizer optimizer(*device, model.table(), model.values(), {});
  LossSpec loss;
  loss.distill_weight = 0;
  loss.vocabulary = 37;
  HeadLoss head(*device, model, loss, 8, std::int64_t(micro.supervised.size()));
  BatchOnDevice batch(*device, std::int64_t(micro.tokens.size()), std::int64_t(micro.supervised.size()));
  const auto step = [&] {
    device->zero(model.gradients());
    batch.upload(micro);
    const View hidden = model.forward(batch.batch());
    model.backward(batch.batch(), head.forward_backward(hidden, batch.labels(), nullptr, 0.01));
    optimizer.step(model.gradients(), 1e-4, std::sqrt(optimizer.squared_norm(model.gradients())));
  };
  const auto in_use = [] {
    const auto info = mallinfo2();
    return info.uordblks + info.hblkhd;
  };
  step();
  step();
  const auto before = in_use();
  for (int i = 0; i < 10; ++i) step();
  CHECK(in_use() == before);
}
