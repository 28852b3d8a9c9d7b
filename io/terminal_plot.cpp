#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "core/error.h"
#include "io/metric_plot.h"
#include "io/plot_panel.h"

namespace distill {

namespace {

constexpr std::array<const char*, 6> colors = {"\x1b[34m", "\x1b[33m", "\x1b[32m", "\x1b[31m", "\x1b[35m", "\x1b[36m"};
constexpr std::string_view plain = "\x1b[0m";

// Dots in cells of two by four, as braille characters have them.
class Canvas {
 public:
  Canvas(int columns, int rows) : columns_(columns), cells_(std::size_t(columns * rows)) {}

  void line(int x0, int y0, int x1, int y1, int color) {
    const int steps = std::max({std::abs(x1 - x0), std::abs(y1 - y0), 1});
    for (int i = 0; i <= steps; ++i)
      dot(x0 + int(std::lround(double(i) * (x1 - x0) / steps)), y0 + int(std::lround(double(i) * (y1 - y0) / steps)),
          color);
  }

  std::string row(int row, bool colored) const {
    std::string out;
    for (int column = 0; column < columns_; ++column) {
      const Cell& cell = cells_[std::size_t(row * columns_ + column)];
      if (cell.dots == 0)
        out += ' ';
      else if (colored)
        out += text(colors[std::size_t(cell.color) % colors.size()], braille(cell.dots), plain);
      else
        out += braille(cell.dots);
    }
    return out;
  }

 private:
  struct Cell {
    std::uint8_t dots = 0;
    int color = 0;
  };

  // U+2800 and a bit a dot, in UTF-8.
  static std::string braille(std::uint8_t dots) { return {'\xe2', char(0xa0 + dots / 64), char(0x80 + dots % 64)}; }

  void dot(int x, int y, int color) {
    constexpr std::uint8_t bits[4][2] = {{0x01, 0x08}, {0x02, 0x10}, {0x04, 0x20}, {0x40, 0x80}};
    Cell& cell = cells_[std::size_t(y / 4 * columns_ + x / 2)];
    cell.dots |= bits[y % 4][x % 2];
    cell.color = color;
  }

  int columns_;
  std::vector<Cell> cells_;
};

std::string right(const std::string& words, std::size_t width) {
  return std::string(width - std::min(width, words.size()), ' ') + words;
}

// "train/loss, student/val_loss [nat]"
std::string heading(const Panel& panel, const PlotOptions& options) {
  std::string out;
  for (std::size_t i = 0; i < panel.lines.size(); ++i) {
    const std::string& name = panel.lines[i]->name;
    out += text(i == 0 ? "" : ", ", options.colors ? colors[i % colors.size()] : "", name, options.colors ? plain : "");
  }
  if (!panel.unit.empty()) out += text(" [", panel.unit, ']');
  return out + (options.log ? ", logarithmic" : "");
}

// Labels of the steps below their ticks; one that would touch its neighbour or leave the plot is left out.
std::string step_labels(const Panel& panel, int width) {
  std::string out(std::size_t(width), ' ');
  int free = 0;
  for (const double tick : panel.steps.ticks) {
    const std::string label = short_number(tick);
    const int size = int(label.size());
    const int at = std::clamp(int(panel.steps.place(tick) * (width - 1)) - size / 2, 0, std::max(0, width - size));
    if (at < free || at + size > width) continue;
    out.replace(std::size_t(at), std::size_t(size), label);
    free = at + size + 1;
  }
  return out;
}

std::string draw(const Panel& panel, const PlotOptions& options) {
  std::vector<std::string> labels(std::size_t(options.rows));
  for (const double tick : panel.values.ticks) {
    const auto row = std::size_t(std::lround((1 - panel.values.place(tick)) * (options.rows - 1)));
    labels[row] = short_number(tick);
  }
  std::size_t margin = 0;
  for (const std::string& label : labels) margin = std::max(margin, label.size());
  const int width = std::max(10, options.columns - int(margin) - 3);
  Canvas canvas(width, options.rows);
  for (std::size_t i = 0; i < panel.lines.size(); ++i) {
    int x = -1, y = -1;
    for (const MetricPoint& point : panel.lines[i]->points) {
      const bool is_shown = can_show(point.value, options.log);
      const int old_x = x, old_y = y;
      x = is_shown ? int(std::lround(panel.steps.place(double(point.step)) * (2 * width - 1))) : -1;
      y = is_shown ? int(std::lround((1 - panel.values.place(point.value)) * (4 * options.rows - 1))) : -1;
      if (is_shown) canvas.line(old_x < 0 ? x : old_x, old_x < 0 ? y : old_y, x, y, int(i));
    }
  }
  std::string out = std::string(margin + 2, ' ') + heading(panel, options) + '\n';
  for (int row = 0; row < options.rows; ++row) {
    const std::string& label = labels[std::size_t(row)];
    out += right(label, margin) + (label.empty() ? " │" : " ┤") + canvas.row(row, options.colors) + '\n';
  }
  std::string line;
  for (int i = 0; i < width; ++i) line += "─";
  return out + std::string(margin + 1, ' ') + "└" + line + '\n' + std::string(margin + 2, ' ') +
         step_labels(panel, width) + '\n' + std::string(margin + 2, ' ') + "step\n";
}

}  // namespace

std::string terminal_plot(std::span<const MetricSeries> series, const PlotOptions& options) {
  std::string out = options.title + '\n';
  const int step_ticks = std::max(2, options.columns / 12), value_ticks = std::max(2, options.rows / 3);
  for (const Panel& panel : make_panels(series, options.log, options.colors, step_ticks, value_ticks))
    out += draw(panel, options);
  return out;
}

}  // namespace distill
