#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <string_view>

#include "core/error.h"
#include "io/metric_plot.h"
#include "io/plot_panel.h"

namespace distill {

namespace {

constexpr double width = 960, left = 84, right = 28, top = 58, panel_height = 340, gap = 86, bottom = 56;
constexpr double plot_width = width - left - right;
constexpr std::string_view ink = "#1f2933", faint = "#616e7c", grid = "#e4e7eb";
// Told apart by people with any kind of colour vision (after Okabe and Ito).
constexpr std::array<std::string_view, 6> colors = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"};

std::string number(double value) {
  std::array<char, 32> out{};
  std::snprintf(out.data(), out.size(), "%.1f", value);
  return out.data();
}

std::string escaped(std::string_view words) {
  std::string out;
  for (const char c : words) out += c == '&' ? "&amp;" : c == '<' ? "&lt;" : c == '>' ? "&gt;" : std::string(1, c);
  return out;
}

// Where a text stands, its anchor (start, middle, end) and colour.
std::string label(double x, double y, std::string_view anchor, std::string_view color, std::string_view words,
                  std::string_view more = "") {
  return text("<text x=\"", number(x), "\" y=\"", number(y), "\" text-anchor=\"", anchor, "\" fill=\"", color, "\"",
              more, '>', escaped(words), "</text>\n");
}

std::string rule(double x0, double y0, double x1, double y1, std::string_view color) {
  return text("<line x1=\"", number(x0), "\" y1=\"", number(y0), "\" x2=\"", number(x1), "\" y2=\"", number(y1),
              "\" stroke=\"", color, "\"/>\n");
}

struct Place {
  double x, y;
};

// Of the points that fall on the same half pixel only the first, lowest, highest and last can be seen.
std::vector<Place> thinned(const std::vector<Place>& all) {
  std::vector<Place> out;
  for (std::size_t first = 0, end; first < all.size(); first = end) {
    for (end = first + 1; end < all.size() && std::floor(2 * all[end].x) == std::floor(2 * all[first].x);) ++end;
    const auto begin = all.begin() + std::ptrdiff_t(first), stop = all.begin() + std::ptrdiff_t(end);
    const auto [low, high] = std::minmax_element(begin, stop, [](const Place& a, const Place& b) { return a.y < b.y; });
    std::array kept = {begin, low, high, stop - 1};
    std::sort(kept.begin(), kept.end());
    const auto distinct = std::unique(kept.begin(), kept.end());
    for (auto it = kept.begin(); it != distinct; ++it) out.push_back(**it);
  }
  return out;
}

std::string path_of(const std::vector<Place>& places, std::string_view color) {
  std::string path;
  for (const Place& place : places) path += text(path.empty() ? "M" : " L", number(place.x), ',', number(place.y));
  return text("<path d=\"", path, "\" fill=\"none\" stroke=\"", color,
              "\" stroke-width=\"1.6\" stroke-linejoin=\"round\" stroke-linecap=\"round\"/>\n");
}

// The line of a metric, interrupted where a value cannot be shown; few points are marked.
std::string curve(const MetricSeries& series, const Panel& panel, double y0, std::string_view color) {
  std::string out;
  std::vector<Place> run;
  const bool is_sparse = series.points.size() <= 60;
  const auto finish = [&] {
    if (run.size() > 1) out += path_of(thinned(run), color);
    if (is_sparse || run.size() == 1)
      for (const Place& place : run)
        out += text("<circle cx=\"", number(place.x), "\" cy=\"", number(place.y), "\" r=\"2.8\" fill=\"", color,
                    "\"/>\n");
    run.clear();
  };
  for (const MetricPoint& point : series.points)
    if (can_show(point.value, panel.values.log))
      run.push_back({left + panel.steps.place(double(point.step)) * plot_width,
                     y0 + (1 - panel.values.place(point.value)) * panel_height});
    else
      finish();
  finish();
  return out;
}

std::string axes(const Panel& panel, double y0) {
  std::string out;
  const double base = y0 + panel_height;
  for (const double tick : panel.values.ticks) {
    const double y = y0 + (1 - panel.values.place(tick)) * panel_height;
    out += rule(left, y, left + plot_width, y, grid) + label(left - 10, y + 4, "end", faint, short_number(tick));
  }
  for (const double tick : panel.steps.ticks) {
    const double x = left + panel.steps.place(tick) * plot_width;
    out += rule(x, y0, x, base, grid) + rule(x, base, x, base + 5, faint) +
           label(x, base + 20, "middle", faint, short_number(tick));
  }
  out += rule(left, base, left + plot_width, base, faint) + rule(left, y0, left, base, faint);
  const double middle = y0 + panel_height / 2;
  const std::string scale = panel.values.log ? (panel.unit.empty() ? "log scale" : ", log scale") : "";
  return out + label(left + plot_width / 2, base + 40, "middle", ink, "step") +
         label(22, middle, "middle", ink, panel.unit + scale,
               text(" transform=\"rotate(-90 22 ", number(middle), ")\""));
}

// Names above the plot, each behind a piece of its line.
std::string legend(const Panel& panel, double y0, std::size_t first_color) {
  std::string out;
  double x = left;
  for (std::size_t i = 0; i < panel.lines.size(); ++i) {
    const std::string_view color = colors[(first_color + i) % colors.size()];
    out += text("<line x1=\"", number(x), "\" y1=\"", number(y0 - 14), "\" x2=\"", number(x + 20), "\" y2=\"",
                number(y0 - 14), "\" stroke=\"", color, "\" stroke-width=\"3\"/>\n") +
           label(x + 27, y0 - 10, "start", ink, panel.lines[i]->name);
    x += 51 + 7.3 * double(panel.lines[i]->name.size());
  }
  return out;
}

}  // namespace

std::string svg_plot(std::span<const MetricSeries> series, const PlotOptions& options) {
  const std::vector<Panel> panels = make_panels(series, options.log, /*share=*/true, 10, 6);
  const double height = top + double(panels.size()) * (panel_height + gap) - gap + bottom;
  std::string out = text("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 ", number(width), ' ', number(height),
                         "\" width=\"", number(width), "\" height=\"", number(height),
                         "\" font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\">\n",
                         "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n",
                         label(left, 26, "start", ink, options.title, " font-size=\"16\" font-weight=\"bold\""));
  double y0 = top;
  std::size_t color = 0;
  for (const Panel& panel : panels) {
    out += axes(panel, y0) + legend(panel, y0, color);
    for (const MetricSeries* line : panel.lines) out += curve(*line, panel, y0, colors[color++ % colors.size()]);
    y0 += panel_height + gap;
  }
  return out + "</svg>\n";
}

}  // namespace distill
