// Schedules against values computed by transformers.get_scheduler 5.23.0 (tools/golden/schedules.py prints them).
#include "core/optim/schedule.h"

#include <catch2/catch.hpp>
#include <vector>

using namespace distill;

TEST_CASE("schedules give the multipliers of transformers", "[schedule]") {
  struct Case {
    double (*factor)(std::int64_t, std::int64_t, std::int64_t);
    std::int64_t warmup, total;
    std::vector<double> expected;
  };
  const std::vector<Case> cases = {
      {schedules::constant, 0, 6, {1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0}},
      {schedules::constant_with_warmup, 0, 6, {1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0}},
      {schedules::constant_with_warmup,
       3,
       8,
       {0.0, 0.3333333333333333, 0.6666666666666666, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0}},
      {schedules::constant_with_warmup, 2, 2, {0.0, 0.5, 1.0}},
      {schedules::linear,
       0,
       6,
       {1.0, 0.8333333333333334, 0.6666666666666666, 0.5, 0.3333333333333333, 0.16666666666666666, 0.0}},
      {schedules::linear, 3, 8, {0.0, 0.3333333333333333, 0.6666666666666666, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0}},
      {schedules::linear, 2, 2, {0.0, 0.5, 0.0}},
      {schedules::cosine, 0, 6, {1.0, 0.9330127018922194, 0.75, 0.5, 0.2500000000000001, 0.06698729810778065, 0.0}},
      {schedules::cosine,
       3,
       8,
       {0.0, 0.3333333333333333, 0.6666666666666666, 1.0, 0.9045084971874737, 0.6545084971874737, 0.34549150281252633,
        0.09549150281252633, 0.0}},
      {schedules::cosine, 2, 2, {0.0, 0.5, 1.0}},
  };
  for (const Case& c : cases)
    for (std::size_t k = 0; k < c.expected.size(); ++k) {
      CAPTURE(c.warmup, c.total, k);
      CHECK(c.factor(std::int64_t(k), c.warmup, c.total) == Approx(c.expected[k]).epsilon(1e-14).margin(1e-15));
    }
}
