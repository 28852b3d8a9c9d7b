#include "core/train/outlier.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

using namespace distill;

TEST_CASE("mean, sample deviation and z-score are those of the textbook", "[outlier]") {
  OutlierWindow window(8);
  for (const double value : {2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0}) window.accept(value);
  CHECK(window.mean() == Approx(5));                         // 40 / 8
  CHECK(window.deviation() == Approx(std::sqrt(32.0 / 7)));  // squares 9 1 1 1 0 0 4 16
  CHECK(window.zscore(11) == Approx(6 / std::sqrt(32.0 / 7)));
  CHECK(window.zscore(1) == Approx(-4 / std::sqrt(32.0 / 7)));
}

TEST_CASE("a window that is not full judges nothing, a full one forgets the oldest", "[outlier]") {
  OutlierWindow window(3);
  for (const double value : {1.0, 2.0}) {
    window.accept(value);
    CHECK(window.zscore(1e9) == 0);
  }
  window.accept(3);
  CHECK(window.zscore(1e9) > 1e8);
  window.accept(4);
  CHECK(window.values() == std::vector<double>{2, 3, 4});
  CHECK(window.zscore(5) == Approx(2));  // mean 3, deviation 1
}

TEST_CASE("equal values have no deviation: the same is no outlier, any more is", "[outlier]") {
  OutlierWindow window(2);
  window.accept(0.1);
  window.accept(0.1);
  CHECK(window.zscore(0.1) == 0);
  CHECK(window.zscore(0.2) == std::numeric_limits<double>::infinity());
}

TEST_CASE("a window that is restored goes on with the same bits", "[outlier]") {
  std::mt19937 random(1);
  std::lognormal_distribution<double> values;
  OutlierWindow whole(10), first(10), smaller(4);
  for (int i = 0; i < 17; ++i) {
    const double value = values(random);
    whole.accept(value);
    first.accept(value);
  }
  OutlierWindow second(10);
  second.restore(first.values());
  for (int i = 0; i < 5; ++i) {
    const double value = values(random);
    CHECK(second.zscore(value) == whole.zscore(value));
    whole.accept(value);
    second.accept(value);
  }
  smaller.restore(whole.values());
  CHECK(smaller.values() == std::vector<double>(whole.values().end() - 4, whole.values().end()));
}
