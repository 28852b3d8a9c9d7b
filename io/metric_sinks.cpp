#include "io/metric_sinks.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <optional>
#include <ostream>
#include <string_view>

#include "core/error.h"
#include "io/mapped_file.h"

namespace distill {

namespace {

// The shortest text that reads back as the same number.
std::string exact(double value) {
  std::array<char, 32> digits{};
  return {digits.data(), std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr};
}

std::string header_of(const std::vector<std::string>& names) {
  std::string out = "step,wall_time";
  for (const std::string& name : names) out += ',' + name;
  return out + '\n';
}

std::optional<std::int64_t> step_of(std::string_view line) {
  std::int64_t step = 0;
  const auto [end, error] = std::from_chars(line.data(), line.data() + line.size(), step);
  const bool is_row = error == std::errc() && end != line.data() + line.size() && *end == ',';
  return is_row ? std::optional(step) : std::nullopt;
}

// Bytes of an older file to keep: its header and the lines up to a step. A torn line ends what is kept.
std::size_t bytes_to_keep(std::string_view file, const std::string& header, std::int64_t step,
                          const std::string& path) {
  check_input(file.starts_with(header), path,
              ": has other columns than this run writes; move the file away to go on with a new one");
  const auto commas = std::count(header.begin(), header.end(), ',');
  std::size_t end = header.size();
  for (;;) {
    const std::size_t line_end = file.find('\n', end);
    if (line_end == std::string_view::npos) return end;
    const std::string_view line = file.substr(end, line_end - end);
    const auto at = step_of(line);
    if (!at || *at > step || std::count(line.begin(), line.end(), ',') != commas) return end;
    end = line_end + 1;
  }
}

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
constexpr std::array step_parts = {Part{"time/data_wait", "data"},     Part{"time/teacher_wait", "teacher wait"},
                                   Part{"time/forward", "forward"},    Part{"time/loss", "loss"},
                                   Part{"time/backward", "backward"},  Part{"time/reduce", "reduce"},
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

CsvSink::CsvSink(const std::string& path, std::vector<std::string> names, std::int64_t resumed_step, Warn warn)
    : path_(path), names_(std::move(names)), warn_(std::move(warn)) {
  const std::string header = header_of(names_);
  descriptor_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  check_input(descriptor_ >= 0, path, ": cannot open: ", std::strerror(errno));
  if (resumed_step > 0 && lseek(descriptor_, 0, SEEK_END) > 0)
    end_ = std::int64_t(bytes_to_keep(MappedFile(path).bytes(), header, resumed_step, path));
  const bool is_cut = ftruncate(descriptor_, end_) == 0;
  check_input(is_cut, path, ": cannot cut: ", std::strerror(errno));
  if (end_ == 0) append(header);
}

CsvSink::~CsvSink() {
  if (descriptor_ >= 0) close(descriptor_);
}

void CsvSink::write(const MetricRecord& record) {
  std::vector<std::string> cells(names_.size());
  for (const auto& [name, value] : record.values) {
    const auto column = std::find(names_.begin(), names_.end(), name);
    check(column != names_.end(), "metric ", name, " has no column in ", path_);
    cells[std::size_t(column - names_.begin())] = exact(value);
  }
  std::string line = text(record.step, ',', format("%.3f", record.wall_time));
  for (const std::string& cell : cells) line += ',' + cell;
  append(line + '\n');
}

void CsvSink::append(const std::string& line) {
  std::size_t done = 0;
  ssize_t n = 0;
  while (done < line.size() &&
         (n = pwrite(descriptor_, line.data() + done, line.size() - done, end_ + off_t(done))) > 0)
    done += std::size_t(n);
  if (done == line.size()) {
    end_ += std::int64_t(done);
    return;
  }
  const int reason = errno;
  const bool is_cut = ftruncate(descriptor_, end_) == 0;
  if (!warned_ || !is_cut)
    warn_(text(path_, ": cannot write: ", std::strerror(reason), "; metrics are missing from here on"));
  warned_ = true;
}

ConsoleSink::ConsoleSink(std::ostream& out, bool is_terminal, std::int64_t total_steps)
    : out_(out), is_terminal_(is_terminal), total_steps_(total_steps) {}

ConsoleSink::~ConsoleSink() {
  if (bar_is_drawn_) out_ << '\n' << std::flush;
}

std::string ConsoleSink::time_left(const MetricRecord& record) {
  if (first_step_ < 0) {
    first_step_ = record.step;
    first_time_ = record.wall_time;
  }
  const double per_step = record.step > first_step_
                              ? (record.wall_time - first_time_) / double(record.step - first_step_)
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
