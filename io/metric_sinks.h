// The files that metrics go to, as `track_with` of a configuration chooses. README.md says what they hold.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/train/metrics.h"

namespace distill {

struct SinkPlan {
  std::string folder;              // is there
  std::vector<std::string> names;  // of all metrics
  std::int64_t resumed_step = 0;   // older files are cut to it; 0 starts afresh
  std::int64_t last_record = 0;    // the last one that they should hold up to there; 0: not known
  std::function<void(const std::string&)> warn;
};

// `track_with`: some of `metric_sink_names` (core/config.h).
std::vector<std::unique_ptr<MetricSink>> make_sinks(const std::vector<std::string>& track_with, const SinkPlan& plan);

}  // namespace distill
