// metrics.h5: an extendible dataset a metric, readable by others while it is written and after the writer was killed.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/train/metrics.h"
#include "io/metric_series.h"

namespace distill {

// One dataset for each series, of its name, whose elements are (step, wall_time, value). Readers open the file with
// SWMR ("single writer, multiple readers"). A record that cannot be written (the disk is full) is reported and ends the
// file there.
class Hdf5Sink final : public MetricSink {
 public:
  using Warn = std::function<void(const std::string&)>;
  // Writes a new file with the points that there are, which replaces an older one at once: readers of that one keep it.
  Hdf5Sink(const std::string& path, const std::vector<MetricSeries>& so_far, Warn warn);
  ~Hdf5Sink() override;

  void write(const MetricRecord& record) override;
  void sync() override;

 private:
  struct Dataset {
    std::string name;
    std::int64_t id = -1;
    std::uint64_t size = 0;
  };

  Dataset& dataset(const std::string& name);

  std::string path_;
  Warn warn_;
  std::int64_t file_ = -1;
  std::vector<Dataset> datasets_;
  bool is_over_ = false;
  bool sync_warned_ = false;  // of sync()
};

// All series of such a file, whether it is being written, complete or what a killed run left.
std::vector<MetricSeries> read_hdf5_metrics(const std::string& path);

}  // namespace distill
