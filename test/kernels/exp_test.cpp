// Accuracy of the vector exp and log, in every instruction set of this machine.
#include "kernels/cpu/targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "test/kernels/exp_test.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
//
#include <vector>

#include "kernels/cpu/exp-inl.h"

HWY_BEFORE_NAMESPACE();
namespace distill {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

template <class Function>
void apply(std::vector<float>& x, Function function) {
  const hn::ScalableTag<float> d;
  for (std::size_t i = 0; i + hn::Lanes(d) <= x.size(); i += hn::Lanes(d))
    hn::StoreU(function(d, hn::LoadU(d, x.data() + i)), d, x.data() + i);
}
void exp_all(std::vector<float>& x) {
  apply(x, [](auto d, auto v) { return fast_exp(d, v); });
}
void log_all(std::vector<float>& x) {
  apply(x, [](auto d, auto v) { return fast_log(d, v); });
}

}  // namespace HWY_NAMESPACE
}  // namespace distill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

namespace distill {
HWY_EXPORT(exp_all);
HWY_EXPORT(log_all);
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// Floats from a to b, a multiple of 64 of them.
std::vector<float> between(double a, double b) {
  std::vector<float> x(1 << 16);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = float(a + (b - a) * double(i) / double(x.size() - 1));
  return x;
}

// Largest error in units of the last place.
template <class Exact>
double worst_error(const std::vector<float>& x, const std::vector<float>& y, Exact exact) {
  double worst = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double expected = exact(double(x[i]));
    const float rounded = std::abs(float(expected));
    const double ulp = double(std::nextafter(rounded, infinity)) - double(rounded);
    worst = std::max(worst, std::abs(double(y[i]) - expected) / ulp);
  }
  return worst;
}

template <class Body>
void for_each_target(Body&& body) {
  for (std::int64_t left = hwy::SupportedTargets(); left != 0; left &= left - 1) {
    hwy::SetSupportedTargetsForTest(left & -left);
    body(hwy::TargetName(left & -left));
  }
  hwy::SetSupportedTargetsForTest(0);
}

TEST_CASE("exp of vectors", "[exp]") {
  for_each_target([](const char* target) {
    CAPTURE(target);
    const auto error = [](const std::vector<float>& x) {
      std::vector<float> y = x;
      HWY_DYNAMIC_DISPATCH(exp_all)(y);
      return worst_error(x, y, [](double v) { return std::exp(v); });
    };
    CHECK(error(between(-20, 0)) < 2);
    CHECK(error(between(0, 20)) < 2);
    CHECK(error(between(-86.9, 88)) < 6);
    std::vector<float> special(64, -infinity);
    special[1] = -1e30f;
    special[2] = -1e9f;
    special[3] = -110;
    special[4] = std::numeric_limits<float>::quiet_NaN();
    special[5] = 0;
    HWY_DYNAMIC_DISPATCH(exp_all)(special);
    for (int i = 0; i < 4; ++i) CHECK(special[std::size_t(i)] == 0);
    CHECK(std::isnan(special[4]));
    CHECK(special[5] == 1);
  });
}

TEST_CASE("log of vectors", "[exp]") {
  for_each_target([](const char* target) {
    CAPTURE(target);
    for (const auto& [a, b] :
         {std::pair(1e-6, 1.0), std::pair(0.5, 2.0), std::pair(0.9999, 1.0001), std::pair(1.0, 1e6)}) {
      const std::vector<float> x = between(a, b);
      std::vector<float> y = x;
      HWY_DYNAMIC_DISPATCH(log_all)(y);
      CAPTURE(a, b);
      CHECK(worst_error(x, y, [](double v) { return std::log(v); }) < 2);
    }
    std::vector<float> one(64, 1.0f);
    HWY_DYNAMIC_DISPATCH(log_all)(one);
    CHECK(one[0] == 0);
  });
}

}  // namespace
}  // namespace distill
#endif
