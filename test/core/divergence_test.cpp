// Each objective as a function of one vocabulary entry: its slope is the derivative of its value, extremes stay finite.
#include "core/distill/divergence.h"

#include <catch2/catch.hpp>
#include <limits>

#include "test/support/dual.h"

namespace distill {
namespace {

TEMPLATE_LIST_TEST_CASE("the slope of every divergence is the derivative of its value", "[divergence]", Divergences) {
  LossSpec spec;
  spec.skew_lambda = GENERATE(0.1f, 0.7f);
  TestType divergence = TestType::of(spec);
  if constexpr (std::is_same_v<TestType, AdaptiveKl>) {
    divergence.head_weight = 0.3;
    divergence.tail_weight = 0.7;
  }
  const double lp = GENERATE(take(25, random(-12.0, -0.01))), lq = GENERATE(take(4, random(-12.0, -0.01)));
  const Dual value = divergence.value(Outcome<Dual>(Dual(lp, 1), Dual(lq)));
  CHECK(value.d == Approx(divergence.slope(Outcome<double>(lp, lq))).epsilon(1e-12));
  CHECK(value.v == Approx(divergence.value(Outcome<double>(lp, lq))).epsilon(1e-14));
  CHECK(value.v == Approx(divergence.value(Outcome<float>(float(lp), float(lq)))).epsilon(1e-5).margin(1e-7));
}

TEMPLATE_LIST_TEST_CASE("equal probabilities give exactly nothing", "[divergence]", Divergences) {
  const TestType divergence = TestType::of(LossSpec{});
  const float l = GENERATE(-1e-6f, -0.7f, -30.0f, -200.0f, -1e9f);
  CHECK(divergence.value(Outcome<float>(l, l)) == 0);
  CHECK(divergence.value(Outcome<double>(l, l)) == 0);
}

TEMPLATE_LIST_TEST_CASE("underflowing probabilities stay finite", "[divergence]", Divergences) {
  const TestType divergence = TestType::of(LossSpec{});
  const float lp = GENERATE(0.0f, -1.0f, -104.0f, -1e4f, -1e9f), lq = GENERATE(0.0f, -2.0f, -104.0f, -1e4f, -1e9f);
  const Outcome<float> x(lp, lq);
  CAPTURE(lp, lq);
  CHECK(std::isfinite(divergence.value(x)));
  CHECK(std::isfinite(divergence.slope(x)));
}

TEST_CASE("an outcome keeps the digits of both sides", "[divergence]") {
  const double lp = GENERATE(-0.1, -3.0, -40.0), lq = GENERATE(-0.3, -3.0, -60.0);
  const Outcome<double> x(lp, lq);
  CHECK(x.p == Approx(std::exp(lp)).epsilon(1e-13));
  CHECK(x.q == Approx(std::exp(lq)).epsilon(1e-13));
  CHECK(std::max(x.p_rel, x.q_rel) == 1);
  CHECK(x.p_rel / x.q_rel == Approx(std::exp(lp - lq)).epsilon(1e-13));
}

TEST_CASE("the objective is found by its name's place in the list", "[divergence]") {
  LossSpec spec;
  for (std::size_t i = 0; i < objective_names.size(); ++i) {
    spec.objective = Objective(i);
    std::string_view name;
    with_divergence(spec, [&](const auto& divergence) { name = divergence.name; });
    CHECK(name == objective_names[i]);
  }
}

}  // namespace
}  // namespace distill
