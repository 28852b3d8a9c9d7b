#include "io/plot_panel.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string_view>
#include <utility>

#include "core/error.h"
#include "io/metric_plot.h"

namespace distill {

namespace {

// The smallest of 1, 2, 5, 10, 20 … times a power of ten that is at least `least`.
double round_step(double least) {
  const double power = std::pow(10, std::floor(std::log10(least)));
  for (const double factor : {1.0, 2.0, 5.0})
    if (factor * power >= least * (1 - 1e-9)) return factor * power;
  return 10 * power;
}

std::vector<double> linear_ticks(double low, double high, int wanted) {
  const double step = round_step((high - low) / wanted);
  std::vector<double> ticks;
  for (double n = std::ceil(low / step - 1e-9); n * step <= high + 1e-9 * step; ++n)
    ticks.push_back(n == 0 ? 0 : n * step);
  return ticks;
}

// Powers of ten, with their double and fivefold where there are few of them; plain ones over less than a decade.
std::vector<double> log_ticks(double low, double high, int wanted) {
  const double decades = std::log10(high / low);
  if (decades < 1) return linear_ticks(low, high, wanted);
  const int stride = std::max(1, int(std::ceil(decades / wanted)));
  std::vector<double> ticks;
  const int last = int(std::ceil(std::log10(high)));
  for (int power = int(std::floor(std::log10(low))); power <= last; power += stride)
    for (const double factor : {1.0, 2.0, 5.0}) {
      const double tick = factor * std::pow(10, power);
      const bool wanted_here = factor == 1 || 3 * decades <= 2 * wanted;
      if (wanted_here && tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9)) ticks.push_back(tick);
    }
  return ticks;
}

struct Range {
  double low = std::numeric_limits<double>::infinity(), high = -low;

  void add(double value) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
};

template <class Value>
Range range_of(std::span<const MetricSeries* const> lines, bool log, const Value& value) {
  Range range;
  for (const MetricSeries* line : lines)
    for (const MetricPoint& point : line->points)
      if (can_show(point.value, log)) range.add(value(point));
  return range;
}

// A line does not touch the frame.
Range with_room(const Range& range, bool log) {
  constexpr double part = 0.04;
  if (log) {
    const double factor = std::pow(range.high / range.low, part);
    return {range.low / factor, range.high * factor};
  }
  const double room = part * (range.high - range.low);
  return {range.low - room, range.high + room};
}

struct Unit {
  std::string_view metric, unit;
};
// By a metric's name, or its beginning or end where a star stands for the rest; the first that fits counts.
constexpr auto units = std::to_array<Unit>({
    {"student/loss_scale", ""},
    {"student/skipped_steps", "steps"},
    {"student/outlier_steps", "steps"},
    {"train/step_train", "s"},
    {"train/epoch", "epochs"},
    {"system/samples", "samples"},
    {"system/tokens", "tokens"},
    {"system/tps*", "tokens/s"},
    {"global_seqlen/*", "tokens"},
    {"time/pipeline_bubble", ""},
    {"time/*", "s"},
    {"*loss", "nat"},
    {"*_entropy", "nat"},
});

bool fits(std::string_view name, std::string_view pattern) {
  if (pattern.starts_with('*')) return name.ends_with(pattern.substr(1));
  if (pattern.ends_with('*')) return name.starts_with(pattern.substr(0, pattern.size() - 1));
  return name == pattern;
}

}  // namespace

std::string metric_unit(const std::string& name) {
  const auto found = std::find_if(units.begin(), units.end(), [&](const Unit& u) { return fits(name, u.metric); });
  return found == units.end() ? "" : std::string(found->unit);
}

double Axis::place(double value) const {
  return log ? std::log(value / low) / std::log(high / low) : (value - low) / (high - low);
}

Axis make_axis(double low, double high, bool log, int wanted_ticks) {
  if (high - low <= 1e-12 * std::max(std::abs(low), std::abs(high))) {
    const double room = log ? 0.5 * low : std::max(0.5 * std::abs(low), 0.5);
    low -= room;
    high += room;
  }
  return {low, high, log, log ? log_ticks(low, high, wanted_ticks) : linear_ticks(low, high, wanted_ticks)};
}

std::string short_number(double value) {
  std::array<char, 32> out{};
  std::snprintf(out.data(), out.size(), "%.6g", value);
  return out.data();
}

bool can_show(double value, bool log) { return std::isfinite(value) && (!log || value > 0); }

std::vector<Panel> make_panels(std::span<const MetricSeries> series, bool log, bool share, int step_ticks,
                               int value_ticks) {
  std::vector<Panel> panels;
  std::vector<const MetricSeries*> all;
  for (const MetricSeries& line : series) {
    const auto point = [&](const MetricPoint& p) { return can_show(p.value, log); };
    check_input(std::any_of(line.points.begin(), line.points.end(), point), line.name,
                ": has no value that can be shown", log ? " on a logarithmic axis" : "");
    all.push_back(&line);
    const std::string unit = metric_unit(line.name);
    const auto same =
        std::find_if(panels.begin(), panels.end(), [&](const Panel& p) { return share && p.unit == unit; });
    if (same == panels.end())
      panels.push_back({unit, {&line}, {}, {}});
    else
      same->lines.push_back(&line);
  }
  const Range steps = range_of(all, log, [](const MetricPoint& p) { return double(p.step); });
  for (Panel& panel : panels) {
    panel.steps = make_axis(steps.low, steps.high, false, step_ticks);
    const Range values = with_room(range_of(panel.lines, log, [](const MetricPoint& p) { return p.value; }), log);
    panel.values = make_axis(values.low, values.high, log, value_ticks);
  }
  return panels;
}

}  // namespace distill
