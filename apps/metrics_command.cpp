#include "apps/metrics_command.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <numeric>
#include <optional>
#include <vector>

#include "core/error.h"
#include "core/nearest_name.h"
#include "io/config_file.h"
#include "io/csv_sink.h"
#include "io/durable_file.h"
#include "io/hdf5_sink.h"
#include "io/metric_plot.h"

namespace distill {

namespace {

namespace fs = std::filesystem;

// --- finding and reading

// Where runs log, as the configuration and the overrides say; what else they say does not matter here.
fs::path logging_dir(const CommandLine& line) {
  std::string content;
  if (!line.config.empty()) {
    std::ifstream in(line.config, std::ios::binary);
    check_input(in.good(), line.config.string(), ": cannot be read");
    content.assign(std::istreambuf_iterator<char>(in), {});
  }
  const fs::path name = line.config.empty() ? "command line" : line.config;
  return parse_config(content, name, line.overrides).config.logging_dir;
}

fs::path folder_of(const CommandLine& line) {
  const fs::path named = logging_dir(line) / line.metrics.run, given = line.metrics.run;
  for (const fs::path& folder : {named, given})
    if (fs::exists(folder / "metrics.csv") || fs::exists(folder / "metrics.h5")) return folder;
  fail_input("no metrics of a run '", line.metrics.run, "': expected metrics.csv or metrics.h5 in ", named.string(),
             " or ", given.string(), "; logging_dir=FOLDER or --config FILE say where runs log");
}

std::vector<MetricSeries> read_metrics(const fs::path& folder, bool from_hdf5) {
  const fs::path csv = folder / "metrics.csv";
  return from_hdf5 || !fs::exists(csv) ? read_hdf5_metrics(folder / "metrics.h5") : read_csv_metrics(csv);
}

// --- CSV

std::string as_csv(const std::vector<MetricSeries>& all) {
  struct Row {
    double wall_time = 0;
    std::vector<std::optional<double>> values;
  };
  std::map<std::int64_t, Row> rows;
  std::vector<std::string> names;
  for (std::size_t i = 0; i < all.size(); ++i) {
    names.push_back(all[i].name);
    for (const MetricPoint& point : all[i].points) {
      Row& row = rows[point.step];
      row.wall_time = point.wall_time;
      row.values.resize(all.size());
      row.values[i] = point.value;
    }
  }
  std::string out = csv_header(names);
  for (const auto& [step, row] : rows) out += csv_line(step, row.wall_time, row.values);
  return out;
}

// --- summary

std::string number(double value) {
  std::array<char, 32> out{};
  std::snprintf(out.data(), out.size(), "%.6g", value);
  return out.data();
}

std::string utc(double wall_time) {
  const auto seconds = std::time_t(wall_time);
  std::tm parts{};
  std::array<char, 32> out{};
  std::strftime(out.data(), out.size(), "%Y-%m-%d %H:%M:%S", gmtime_r(&seconds, &parts));
  return out.data();
}

using TableRow = std::vector<std::string>;

// Of what is finite: least, greatest and the mean of the last tenth of the points.
TableRow summary_of(const MetricSeries& series) {
  const std::vector<MetricPoint>& points = series.points;
  std::vector<double> all, last;
  const std::size_t tail = points.size() - (points.size() + 9) / 10;
  for (std::size_t i = 0; i < points.size(); ++i) {
    if (!std::isfinite(points[i].value)) continue;
    all.push_back(points[i].value);
    if (i >= tail) last.push_back(points[i].value);
  }
  const auto [low, high] = std::minmax_element(all.begin(), all.end());
  const double mean = std::accumulate(last.begin(), last.end(), 0.0) / double(last.size());
  return {series.name,
          metric_unit(series.name),
          number(points.front().value),
          number(points.back().value),
          all.empty() ? "" : number(*low),
          all.empty() ? "" : number(*high),
          last.empty() ? "" : number(mean)};
}

// Names and units to the left, numbers to the right.
std::string table(const std::vector<TableRow>& rows) {
  std::vector<std::size_t> widths(rows.front().size());
  for (const TableRow& row : rows)
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  std::string out;
  for (const TableRow& row : rows) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::string room(widths[i] - row[i].size(), ' ');
      line += text(i == 0 ? "" : "  ", i < 2 ? row[i] + room : room + row[i]);
    }
    out += line.substr(0, line.find_last_not_of(' ') + 1) + '\n';
  }
  return out;
}

std::string summary(const fs::path& folder, const std::vector<MetricSeries>& all) {
  std::vector<TableRow> rows = {{"metric", "unit", "first", "last", "least", "greatest", "mean of last 10%"}};
  const MetricSeries* longest = nullptr;
  for (const MetricSeries& series : all) {
    if (series.points.empty()) continue;
    rows.push_back(summary_of(series));
    if (!longest || series.points.size() > longest->points.size()) longest = &series;
  }
  if (!longest) return text(folder.string(), ": no steps yet\n");
  const MetricPoint &first = longest->points.front(), &last = longest->points.back();
  return text(folder.string(), ": steps ", first.step, " to ", last.step, ", ", utc(first.wall_time), " to ",
              utc(last.wall_time), " UTC\n\n", table(rows));
}

// --- plots

std::vector<MetricSeries> chosen(const std::vector<MetricSeries>& all, const std::vector<std::string>& wanted) {
  std::vector<std::string> names;
  for (const MetricSeries& series : all)
    if (!series.points.empty()) names.push_back(series.name);
  std::vector<MetricSeries> out;
  for (const std::string& name : wanted) {
    const auto found = std::find_if(all.begin(), all.end(), [&](const MetricSeries& s) { return s.name == name; });
    const std::string guess = nearest_name(name, names);
    std::string list;
    for (const std::string& other : names) list += (list.empty() ? "" : ", ") + other;
    check_input(found != all.end(), "no metric '", name,
                "': ", guess.empty() ? "expected one of " + list : text("did you mean '", guess, "'?"));
    out.push_back(*found);
  }
  return out;
}

int terminal_columns() {
  winsize size{};
  return ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 100;
}

std::string plot(const MetricsRequest& request, const std::string& title, const std::vector<MetricSeries>& series) {
  PlotOptions options{.title = title, .log = request.log};
  if (request.svg.empty()) {
    options.columns = terminal_columns();
    options.colors = isatty(STDOUT_FILENO) != 0;
    return terminal_plot(series, options);
  }
  const fs::path parent = fs::absolute(request.svg).parent_path();
  check_input(fs::is_directory(parent), "--svg ", request.svg, ": no folder ", parent.string());
  write_durably(request.svg, svg_plot(series, options));
  return text("written: ", request.svg, '\n');
}

}  // namespace

std::string show_metrics(const CommandLine& line) {
  const MetricsRequest& request = line.metrics;
  const fs::path folder = folder_of(line);
  const std::vector<MetricSeries> all = read_metrics(folder, request.from_hdf5);
  if (request.as_csv) return as_csv(all);
  if (request.plot.empty()) return summary(folder, all);
  return plot(request, folder.lexically_normal().string(), chosen(all, request.plot));
}

}  // namespace distill
