// The port through which a run reports numbers: one record a step, any number of sinks.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace distill {

struct MetricRecord {
  std::int64_t step = 0;
  double wall_time = 0;  // seconds since 1970
  std::vector<std::pair<std::string, double>> values;
};

class MetricSink {
 public:
  MetricSink() = default;
  virtual ~MetricSink() = default;
  MetricSink(const MetricSink&) = delete;
  MetricSink& operator=(const MetricSink&) = delete;

  virtual void write(const MetricRecord& record) = 0;
  // Returns when what was written before is on the disk itself and outlasts a loss of power; reports what keeps it from
  // that. Another thread may call it while this one writes.
  virtual void sync() = 0;
};

}  // namespace distill
