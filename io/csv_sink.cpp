#include "io/csv_sink.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <string_view>
#include <utility>

#include "core/error.h"
#include "io/mapped_file.h"

namespace distill {

namespace {

constexpr std::string_view first_columns = "step,wall_time";

std::string exact(double value) {
  std::array<char, 32> digits{};
  return {digits.data(), std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr};
}

std::string milliseconds(double seconds) {
  std::array<char, 64> out{};
  std::snprintf(out.data(), out.size(), "%.3f", seconds);
  return out.data();
}

std::optional<std::int64_t> step_of(std::string_view line) {
  std::int64_t step = 0;
  const auto [end, error] = std::from_chars(line.data(), line.data() + line.size(), step);
  const bool is_row = error == std::errc() && end != line.data() + line.size() && *end == ',';
  return is_row ? std::optional(step) : std::nullopt;
}

// Of an older file.
struct Kept {
  std::size_t bytes = 0;
  std::int64_t step = 0;  // of the last line
};

// Its header and the lines up to a step. A torn line ends what is kept.
Kept lines_to_keep(std::string_view file, const std::string& header, std::int64_t step, const std::string& path) {
  check_input(file.starts_with(header), path,
              ": has other columns than this run writes; move the file away to go on with a new one");
  const auto commas = std::count(header.begin(), header.end(), ',');
  Kept kept{.bytes = header.size()};
  for (;;) {
    const std::size_t line_end = file.find('\n', kept.bytes);
    if (line_end == std::string_view::npos) return kept;
    const std::string_view line = file.substr(kept.bytes, line_end - kept.bytes);
    const auto at = step_of(line);
    if (!at || *at > step || std::count(line.begin(), line.end(), ',') != commas) return kept;
    kept = {line_end + 1, *at};
  }
}

std::vector<std::string_view> split(std::string_view line) {
  std::vector<std::string_view> cells;
  for (std::size_t comma; (comma = line.find(',')) != std::string_view::npos; line.remove_prefix(comma + 1))
    cells.push_back(line.substr(0, comma));
  cells.push_back(line);
  return cells;
}

template <class T>
bool read_number(std::string_view cell, T& value) {
  const auto [end, error] = std::from_chars(cell.data(), cell.data() + cell.size(), value);
  return error == std::errc() && end == cell.data() + cell.size();
}

// Adds a line's values to the series; false where it is none.
bool add_line(std::string_view line, std::vector<MetricSeries>& series) {
  const std::vector<std::string_view> cells = split(line);
  MetricPoint point;
  if (cells.size() != series.size() + 2 || !read_number(cells[0], point.step) ||
      !read_number(cells[1], point.wall_time))
    return false;
  for (std::size_t i = 0; i < series.size(); ++i) {
    if (cells[i + 2].empty()) continue;
    if (!read_number(cells[i + 2], point.value)) return false;
    series[i].points.push_back(point);
  }
  return true;
}

}  // namespace

std::string csv_header(const std::vector<std::string>& names) {
  std::string out(first_columns);
  for (const std::string& name : names) out += ',' + name;
  return out + '\n';
}

std::string csv_line(std::int64_t step, double wall_time, const std::vector<std::optional<double>>& values) {
  std::string line = text(step, ',', milliseconds(wall_time));
  for (const auto& value : values) line += ',' + (value ? exact(*value) : "");
  return line + '\n';
}

CsvSink::CsvSink(const std::string& path, std::vector<std::string> names, std::int64_t resumed_step, Warn warn)
    : names_(std::move(names)), file_(path, std::move(warn)) {
  const std::string header = csv_header(names_);
  Kept kept;
  if (resumed_step > 0 && file_.size() > 0) kept = lines_to_keep(MappedFile(path).bytes(), header, resumed_step, path);
  kept_step_ = kept.step;
  file_.cut(std::int64_t(kept.bytes));
  if (file_.size() == 0) file_.append(header);
}

void CsvSink::write(const MetricRecord& record) {
  std::vector<std::optional<double>> cells(names_.size());
  for (const auto& [name, value] : record.values) {
    const auto column = std::find(names_.begin(), names_.end(), name);
    check(column != names_.end(), "metric ", name, " has no column in ", file_.path());
    cells[std::size_t(column - names_.begin())] = value;
  }
  file_.append(csv_line(record.step, record.wall_time, cells));
}

std::vector<MetricSeries> read_csv_metrics(const std::string& path) {
  const MappedFile file(path);
  std::string_view rest = file.bytes();
  std::vector<MetricSeries> series;
  const auto next_line = [&](std::string_view& line) {
    const std::size_t end = rest.find('\n');
    if (end == std::string_view::npos) return false;
    line = rest.substr(0, end);
    rest.remove_prefix(end + 1);
    return true;
  };
  std::string_view line;
  check_input(next_line(line) && line.starts_with(first_columns), path, ": has no line of columns that begins with ",
              first_columns);
  for (const std::string_view name : split(line)) series.push_back({std::string(name), {}});
  series.erase(series.begin(), series.begin() + 2);
  for (int number = 2; next_line(line); ++number)
    check_input(add_line(line, series), path, ":", number, ": is not a line of ", series.size() + 2, " numbers");
  return series;
}

}  // namespace distill
