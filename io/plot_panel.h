// What plots of every kind have in common: axes with round numbers, and which metrics share a plot.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "io/metric_series.h"

namespace distill {

struct Axis {
  double low = 0, high = 1;
  bool log = false;
  std::vector<double> ticks;  // between low and high

  // 0 at low, 1 at high.
  double place(double value) const;
};

// Round ticks, about as many as wanted. A range that is one value gets room around it; `log` needs low > 0.
Axis make_axis(double low, double high, bool log, int wanted_ticks);

// 0.0001 → "0.0001", 3e-5 → "3e-05", 12000 → "12000"
std::string short_number(double value);

struct Panel {
  std::string unit;
  std::vector<const MetricSeries*> lines;
  Axis steps, values;
};

// One panel per unit, or per metric where they may not share; in the order of the series.
std::vector<Panel> make_panels(std::span<const MetricSeries> series, bool log, bool share, int step_ticks,
                               int value_ticks);

// Whether a point has a place on such an axis.
bool can_show(double value, bool log);

}  // namespace distill
