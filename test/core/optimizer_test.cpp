// AdamW, clipping and loss scaling against the textbook in double.
#include "core/optim/optimizer.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <random>

#include "core/optim/loss_scale.h"
#include "kernels/backends.h"
#include "test/support/tiny_models.h"

using namespace distill;
using namespace distill::test;

namespace {

std::vector<float> random_values(std::int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& v : values) v = normal(random);
  return values;
}

// Zeroes the gaps of the storage, as a model's gradients have them.
std::vector<float> without_gaps(const ParamTable& table, const std::vector<float>& values) {
  std::vector<float> out(values.size(), 0.0f);
  for (const Param& p : table.all())
    for (std::int64_t i = p.offset; i < p.offset + p.size(); ++i) out[std::size_t(i)] = values[std::size_t(i)];
  return out;
}

}  // namespace

TEST_CASE("five clipped AdamW updates equal the textbook in double", "[optimizer]") {
  const auto device = make_cpu_device(2);
  const ParamTable table = param_table(tiny_spec("qwen2", false));
  const std::int64_t n = table.storage_size();
  Tensor values = device->tensor(1, n, DType::f32), gradients = device->tensor(1, n, DType::f32);
  const auto start = without_gaps(table, random_values(n, 1));
  device->upload(values.view(), start.data());
  const OptimizerConfig config{.beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8, .weight_decay = 0.1, .max_grad_norm = 30};
  Optimizer optimizer(*device, table, values.view(), config);

  std::vector<double> w(start.begin(), start.end()), m(std::size_t(n), 0.0), v(std::size_t(n), 0.0);
  for (int t = 1; t <= 5; ++t) {
    const double lr = 1e-2 / t, loss_scale = t == 3 ? 1024 : 1;
    auto g = without_gaps(table, random_values(n, unsigned(10 + t)));
    double norm = 0;
    for (float& x : g) {
      norm += double(x) * x;
      x *= float(loss_scale);
    }
    norm = std::sqrt(norm);
    REQUIRE(norm > config.max_grad_norm);  // clipping acts
    device->upload(gradients.view(), g.data());
    CHECK(std::sqrt(optimizer.squared_norm(gradients.view())) == Approx(norm * loss_scale).epsilon(1e-10));
    optimizer.step(gradients.view(), lr, norm, loss_scale);

    const double clip = config.max_grad_norm / (norm + 1e-6) / loss_scale;
    for (const Param& p : table.all())
      for (std::size_t i = std::size_t(p.offset); i < std::size_t(p.offset + p.size()); ++i) {
        const double grad = double(g[i]) * clip;
        m[i] = config.beta1 * m[i] + (1 - config.beta1) * grad;
        v[i] = config.beta2 * v[i] + (1 - config.beta2) * grad * grad;
        if (p.is_matrix) w[i] *= 1 - lr * config.weight_decay;
        w[i] -= lr * (m[i] / (1 - std::pow(config.beta1, t))) /
                (std::sqrt(v[i] / (1 - std::pow(config.beta2, t))) + config.epsilon);
      }
  }
  CHECK(optimizer.updates() == 5);
  const auto result = download<float>(*device, values.view());
  double largest = 0;
  for (std::size_t i = 0; i < w.size(); ++i) largest = std::max(largest, std::abs(w[i] - double(result[i])));
  CHECK(largest < 5e-6);  // five updates of values up to 4, each rounded to f32 (2e-7)
}

TEST_CASE("16-bit parameters follow their f32 masters", "[optimizer]") {
  const DType dtype = GENERATE(DType::bf16, DType::f16);
  const auto device = make_cpu_device(1);
  const ParamTable table = param_table(tiny_spec("qwen3", true));
  const std::int64_t n = table.storage_size();
  Tensor values = device->tensor(1, n, dtype), same = device->tensor(1, n, dtype),
         gradients = device->tensor(1, n, DType::f32);
  Tensor wide = device->tensor(1, n, DType::f32);
  const auto start = without_gaps(table, random_values(n, 4)), g = without_gaps(table, random_values(n, 5));
  device->upload(wide.view(), start.data());
  device->cast(values.view(), wide.view());
  device->upload(gradients.view(), g.data());
  Optimizer optimizer(*device, table, values.view(), {});
  // Updates of 1e-5 are far below the spacing of 16-bit numbers around 1: only masters can add them up.
  const auto before = download<float>(*device, optimizer.masters());
  for (int i = 0; i < 100; ++i) optimizer.step(gradients.view(), 1e-5, 1);
  const auto after = download<float>(*device, optimizer.masters());
  const Param& p = table.all().front();
  for (std::int64_t i = p.offset; i < p.offset + p.size(); ++i)
    CHECK(before[std::size_t(i)] - after[std::size_t(i)] == Approx(g[std::size_t(i)] > 0 ? 1e-3 : -1e-3).epsilon(0.01));
  device->cast(same.view(), optimizer.masters());
  const auto bits = [&](Tensor& t) {
    std::vector<std::uint16_t> host(static_cast<std::size_t>(n));
    device->download(host.data(), t.view());
    return host;
  };
  CHECK(bits(same) == bits(values));
}

TEST_CASE("a gradient that is not finite shows in the norm", "[optimizer]") {
  const float bad = GENERATE(std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN());
  const auto device = make_cpu_device(2);
  const ParamTable table = param_table(tiny_spec("llama", true));
  const std::int64_t n = table.storage_size();
  Tensor values = device->tensor(1, n, DType::f32), gradients = device->tensor(1, n, DType::f32);
  device->zero(values.view());
  std::vector<float> g(std::size_t(n), 1.0f);
  g[g.size() / 2] = bad;
  device->upload(gradients.view(), g.data());
  Optimizer optimizer(*device, table, values.view(), {});
  CHECK_FALSE(std::isfinite(std::sqrt(optimizer.squared_norm(gradients.view()))));
}

TEST_CASE("the loss scale halves on overflow and doubles after 2000 good steps", "[optimizer]") {
  LossScale scale(true);
  CHECK(scale.value() == 65536);
  scale.shrink();
  CHECK(scale.value() == 32768);
  for (int i = 0; i < 1999; ++i) scale.count_good_step();
  CHECK(scale.value() == 32768);
  scale.count_good_step();
  CHECK(scale.value() == 65536);
  while (scale.can_shrink()) scale.shrink();
  CHECK(scale.value() == 1);
  LossScale off(false);
  CHECK(off.value() == 1);
  CHECK_FALSE(off.can_shrink());
}
