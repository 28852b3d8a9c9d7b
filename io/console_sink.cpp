#include "io/console_sink.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <optional>
#include <ostream>
#include <string_view>
#include <utility>

#include "core/error.h"

namespace distill {

namespace {

std::string format(const char* pattern, double value) {
  std::array<char, 64> out{};
  std::snprintf(out.data(), out.size(), pattern, value);
  return out.data();
}

// 12345 → "12.3k"
std::string short_count(double value) {
  if (value >= 1e6) return format("%.2fM", value / 1e6);
  if (value >= 1e4) return format("%.1fk", value / 1e3);
  return format("%.0f", value);
}

std::string short_time(double seconds) {
  return seconds >= 10 ? format("%.1f s", seconds) : format("%.0f ms", seconds * 1e3);
}

// A value of a record by name; nothing where it is not reported.
std::optional<double> find(const MetricRecord& record, std::string_view name) {
  const auto found =
      std::find_if(record.values.begin(), record.values.end(), [&](const auto& v) { return v.first == name; });
  return found == record.values.end() ? std::nullopt : std::optional(found->second);
}

struct Part {
  const char *metric, *label;
};
constexpr std::array step_parts = {Part{"time/data_wait", "data"},
                                   Part{"time/teacher_wait", "teacher wait"},
                                   Part{"time/pipeline_bubble", "pipeline wait"},
                                   Part{"time/forward", "forward"},
                                   Part{"time/loss", "loss"},
                                   Part{"time/backward", "backward"},
                                   Part{"time/reduce", "reduce"},
                                   Part{"time/optimizer", "optimizer"}};

// "412 ms (data 1%, teacher wait 12%, …)"
std::string step_time(const MetricRecord& record, double seconds) {
  std::string parts;
  for (const Part& part : step_parts)
    if (const auto value = find(record, part.metric); value && seconds > 0)
      parts += text(parts.empty() ? "" : ", ", part.label, format(" %.0f%%", 100 * *value / seconds));
  return text("step ", short_time(seconds), parts.empty() ? "" : " (" + parts + ")");
}

}  // namespace

ConsoleSink::ConsoleSink(std::ostream& out, bool is_terminal, std::int64_t total_steps, std::function<double()> seconds)
    : out_(out), is_terminal_(is_terminal), total_steps_(total_steps), seconds_(std::move(seconds)) {}

ConsoleSink::~ConsoleSink() {
  if (bar_is_drawn_) out_ << '\n' << std::flush;
}

std::string ConsoleSink::time_left(const MetricRecord& record) {
  if (first_step_ < 0) {
    first_step_ = record.step;
    first_time_ = seconds_();
  }
  const double per_step = record.step > first_step_ ? (seconds_() - first_time_) / double(record.step - first_step_)
                                                    : find(record, "train/step_train").value_or(0);
  return duration_text(per_step * double(total_steps_ - record.step));
}

void ConsoleSink::write(const MetricRecord& record) {
  std::string line = text("step ", record.step, '/', total_steps_);
  const auto add = [&](const char* metric, const char* label, const char* pattern) {
    if (const auto value = find(record, metric)) line += text(" | ", label, format(pattern, *value));
  };
  add("train/loss", "loss ", "%.4f");
  add("train/train_distill_loss", "distill loss ", "%.4f");
  add("train/train_student_loss", "student CE loss ", "%.4f");
  add("student/val_loss", "validation loss ", "%.4f");
  add("student/lr", "lr ", "%.3g");
  add("student/grad_norm", "grad norm ", "%.3g");
  add("student/loss_scale", "loss scale ", "%.0f");
  if (const auto tps = find(record, "system/tps")) line += text(" | ", short_count(*tps), " tokens/s");
  if (const auto seconds = find(record, "train/step_train")) line += text(" | ", step_time(record, *seconds));
  const std::string left = time_left(record);
  if (record.step < total_steps_) line += text(" | ", left, " left");
  if (!is_terminal_) {
    out_ << line << '\n' << std::flush;
    return;
  }
  constexpr int width = 40;
  const double share = total_steps_ > 0 ? double(record.step) / double(total_steps_) : 1;
  const int filled = std::clamp(int(share * width), 0, width);
  // \r and "erase to the end of the line" take the old bar away.
  out_ << "\r\x1b[K" << line << "\n[" << std::string(std::size_t(filled), '#')
       << std::string(std::size_t(width - filled), '.') << ']' << format(" %.0f%%", 100 * share) << ", " << left
       << " left" << std::flush;
  bar_is_drawn_ = true;
}

std::string duration_text(double seconds) {
  const auto whole = std::int64_t(std::llround(std::clamp(seconds, 0.0, 1e15)));
  if (whole < 60) return text(whole, " s");
  if (whole < 3600) return text(whole / 60, " min ", whole % 60, " s");
  if (whole < 86400) return text(whole / 3600, " h ", whole % 3600 / 60, " min");
  return text(whole / 86400, " d ", whole % 86400 / 3600, " h");
}

}  // namespace distill
