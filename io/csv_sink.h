// metrics.csv: the record of a run that survives whatever happens to it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/train/metrics.h"
#include "io/append_file.h"
#include "io/metric_series.h"

namespace distill {

// A line a record: step, wall_time and one column for each of `names`, empty where the record has no such value. A line
// that cannot be written (the disk is full) is left out and reported once; the file stays well-formed.
class CsvSink final : public MetricSink {
 public:
  using Warn = AppendFile::Warn;
  // An older file is cut to its lines up to `resumed_step`; 0 starts afresh.
  CsvSink(const std::string& path, std::vector<std::string> names, std::int64_t resumed_step, Warn warn);

  void write(const MetricRecord& record) override;
  void sync() override { file_.sync(); }
  std::int64_t kept_step() const { return kept_step_; }  // the last one of the older file that was kept; 0: none

 private:
  std::vector<std::string> names_;
  std::int64_t kept_step_ = 0;
  AppendFile file_;
};

// "step,wall_time,a,b" with its line break.
std::string csv_header(const std::vector<std::string>& names);
// A line of values, one of each column; numbers are the shortest texts that read back as the same.
std::string csv_line(std::int64_t step, double wall_time, const std::vector<std::optional<double>>& values);

// All columns of such a file. A torn last line, which a killed run may leave, is passed over.
std::vector<MetricSeries> read_csv_metrics(const std::string& path);

}  // namespace distill
