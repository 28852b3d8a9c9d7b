#include "io/metric_sinks.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <filesystem>
#include <string_view>

#include "core/config.h"
#include "core/error.h"
#include "io/csv_sink.h"
#include "io/hdf5_sink.h"
#include "io/tensorboard_sink.h"

namespace distill {

namespace {

using Names = std::vector<std::string>;

bool has(const Names& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

std::string in_folder(const SinkPlan& plan, const char* name) { return std::filesystem::path(plan.folder) / name; }

// The points up to the resumed step: those of metrics.csv, which was cut before, or without it those of metrics.h5.
std::vector<MetricSeries> points_so_far(const SinkPlan& plan, bool has_csv) {
  const std::string csv = in_folder(plan, "metrics.csv"), h5 = in_folder(plan, "metrics.h5");
  std::vector<MetricSeries> older, all;
  if (has_csv) {
    older = read_csv_metrics(csv);
  } else if (plan.resumed_step > 0 && std::filesystem::exists(h5)) {
    try {
      older = read_hdf5_metrics(h5);
    } catch (const Error& error) {
      plan.warn(text(error.what(), "; a new file begins after step ", plan.resumed_step));
    }
  }
  for (const std::string& name : plan.names) {
    const auto found = std::find_if(older.begin(), older.end(), [&](const MetricSeries& s) { return s.name == name; });
    all.push_back(found == older.end() ? MetricSeries{name, {}} : std::move(*found));
    std::erase_if(all.back().points, [&](const MetricPoint& point) { return point.step > plan.resumed_step; });
  }
  return all;
}

// The record that goes on: what a loss of power, another folder or a full disk took from it.
void report_gap(const SinkPlan& plan, const std::string& path, std::int64_t last) {
  if (last < plan.last_record)
    plan.warn(
        text(path, ": lacks the records of steps ", last + 1, " to ", plan.last_record, " of the run that is resumed"));
}

std::int64_t last_step(const std::vector<MetricSeries>& all) {
  std::int64_t last = 0;
  for (const MetricSeries& series : all)
    if (!series.points.empty()) last = std::max(last, series.points.back().step);
  return last;
}

double now() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

struct SinkKind {
  std::string_view name;
  std::unique_ptr<MetricSink> (*make)(const Names& track_with, const SinkPlan& plan);
};

// In the order in which they are made and written to: what metrics.csv is cut to is what metrics.h5 is rebuilt from.
constexpr std::array<SinkKind, metric_sink_names.size()> kinds = {{
    {"csv",
     [](const Names&, const SinkPlan& plan) -> std::unique_ptr<MetricSink> {
       const std::string path = in_folder(plan, "metrics.csv");
       auto sink = std::make_unique<CsvSink>(path, plan.names, plan.resumed_step, plan.warn);
       report_gap(plan, path, sink->kept_step());
       return sink;
     }},
    {"hdf5",
     [](const Names& track_with, const SinkPlan& plan) -> std::unique_ptr<MetricSink> {
       const auto so_far = points_so_far(plan, has(track_with, "csv"));
       const std::string path = in_folder(plan, "metrics.h5");
       if (!has(track_with, "csv")) report_gap(plan, path, last_step(so_far));
       return std::make_unique<Hdf5Sink>(path, so_far, plan.warn);
     }},
    {"tensorboard",
     [](const Names&, const SinkPlan& plan) -> std::unique_ptr<MetricSink> {
       return std::make_unique<TensorboardSink>(plan.folder, plan.resumed_step, now(), plan.warn);
     }},
}};

}  // namespace

std::vector<std::unique_ptr<MetricSink>> make_sinks(const Names& track_with, const SinkPlan& plan) {
  std::vector<std::unique_ptr<MetricSink>> sinks;
  for (const SinkKind& kind : kinds)
    if (has(track_with, kind.name)) sinks.push_back(kind.make(track_with, plan));
  return sinks;
}

}  // namespace distill
