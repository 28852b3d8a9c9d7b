// What a run has reported so far, as its files tell it: a series of points per metric.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace distill {

struct MetricPoint {
  std::int64_t step = 0;
  double wall_time = 0;  // seconds since 1970, to the millisecond
  double value = 0;
};

struct MetricSeries {
  std::string name;
  std::vector<MetricPoint> points;  // of the steps that reported it
};

}  // namespace distill
