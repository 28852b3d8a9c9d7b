// Plots of metrics: as text for a terminal and as a standalone SVG file.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "io/metric_series.h"

namespace distill {

// What a metric is measured in; empty for plain numbers.
std::string metric_unit(const std::string& name);

struct PlotOptions {
  std::string title;
  bool log = false;    // vertical axis; values that are not positive are left out
  int columns = 80;    // of the terminal
  int rows = 16;       // of one plot on it
  bool colors = true;  // of the terminal: several lines share a plot only where colours tell them apart
};

// Metrics of one unit share a plot; the plots stand below each other over the same steps. Without a value that can be
// shown it is an input error.
std::string terminal_plot(std::span<const MetricSeries> series, const PlotOptions& options);
std::string svg_plot(std::span<const MetricSeries> series, const PlotOptions& options);

}  // namespace distill
