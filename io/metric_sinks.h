// Where metrics go: a CSV file and the console. README.md says what they write.
#pragma once

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <string>
#include <vector>

#include "core/train/metrics.h"

namespace distill {

// A line a record: step, wall_time and one column for each of `names`, empty where the record has no such value. A line
// that cannot be written (the disk is full) is left out and reported once; the file stays well-formed.
class CsvSink final : public MetricSink {
 public:
  using Warn = std::function<void(const std::string&)>;
  // An older file is cut to its lines up to `resumed_step`; 0 starts afresh.
  CsvSink(const std::string& path, std::vector<std::string> names, std::int64_t resumed_step, Warn warn);
  ~CsvSink() override;

  void write(const MetricRecord& record) override;

 private:
  void append(const std::string& line);

  std::string path_;
  std::vector<std::string> names_;
  Warn warn_;
  bool warned_ = false;
  int descriptor_ = -1;
  std::int64_t end_ = 0;  // bytes of complete lines
};

// A line a record for people; on a terminal a progress bar stays below the lines.
class ConsoleSink final : public MetricSink {
 public:
  ConsoleSink(std::ostream& out, bool is_terminal, std::int64_t total_steps);
  ~ConsoleSink() override;

  void write(const MetricRecord& record) override;

 private:
  std::string time_left(const MetricRecord& record);

  std::ostream& out_;
  bool is_terminal_;
  std::int64_t total_steps_;
  std::int64_t first_step_ = -1;  // and its time: of the first record
  double first_time_ = 0;
  bool bar_is_drawn_ = false;
};

// 75 s → "1 min 15 s".
std::string duration_text(double seconds);

}  // namespace distill
