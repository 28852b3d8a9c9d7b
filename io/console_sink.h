// Metrics as lines for people.
#pragma once

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <string>

#include "core/train/metrics.h"

namespace distill {

// A line a record for people; on a terminal a progress bar stays below the lines.
class ConsoleSink final : public MetricSink {
 public:
  // seconds: a clock that never jumps; the time that is left is told by it.
  ConsoleSink(std::ostream& out, bool is_terminal, std::int64_t total_steps, std::function<double()> seconds);
  ~ConsoleSink() override;

  void write(const MetricRecord& record) override;
  void sync() override {}  // is no file

 private:
  std::string time_left(const MetricRecord& record);

  std::ostream& out_;
  bool is_terminal_;
  std::int64_t total_steps_;
  std::function<double()> seconds_;
  std::int64_t first_step_ = -1;  // and its time: of the first record
  double first_time_ = 0;
  bool bar_is_drawn_ = false;
};

// 75 s → "1 min 15 s".
std::string duration_text(double seconds);

}  // namespace distill
