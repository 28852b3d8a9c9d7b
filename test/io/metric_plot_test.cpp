#include "io/metric_plot.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

#include "io/plot_panel.h"
#include "test/support/refusal.h"

using namespace distill;
using namespace distill::test;

namespace {

using Values = std::vector<double>;

MetricSeries series(const std::string& name, const Values& values) {
  MetricSeries out{name, {}};
  for (std::size_t i = 0; i < values.size(); ++i) out.points.push_back({std::int64_t(i + 1), 0, values[i]});
  return out;
}

std::size_t occurrences(const std::string& text, const std::string& part) {
  std::size_t count = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

void check_ticks(const Axis& axis, const Values& expected) {
  REQUIRE(axis.ticks.size() == expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) CHECK(axis.ticks[i] == Approx(expected[i]));
}

const double inf = std::numeric_limits<double>::infinity();

}  // namespace

TEST_CASE("axes have round ticks", "[plot]") {
  check_ticks(make_axis(0, 10, false, 5), {0, 2, 4, 6, 8, 10});
  check_ticks(make_axis(3.9, 8.4, false, 5), {4, 5, 6, 7, 8});
  check_ticks(make_axis(-0.3, 0.3, false, 6), {-0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3});
  check_ticks(make_axis(1, 300, false, 3), {100, 200, 300});
  check_ticks(make_axis(2e-6, 3e-6, false, 2), {2e-6, 2.5e-6, 3e-6});
  check_ticks(make_axis(0.5, 2000, true, 4), {1, 10, 100, 1000});
  check_ticks(make_axis(1, 30, true, 6), {1, 2, 5, 10, 20});
  check_ticks(make_axis(4, 7, true, 3), {4, 5, 6, 7});
  check_ticks(make_axis(1e-9, 1, true, 3), {1e-9, 1e-6, 1e-3, 1});
  for (const double value : {0.0, 5.0, -2e-9, 1e12}) {
    const Axis flat = make_axis(value, value, false, 4);  // one value lies in the middle
    CHECK(flat.place(value) == Approx(0.5));
    CHECK(!flat.ticks.empty());
  }
  CHECK(make_axis(1, 100, true, 4).place(10) == Approx(0.5));
  CHECK(make_axis(3, 3, true, 4).ticks.size() > 1);
}

TEST_CASE("units", "[plot]") {
  CHECK(metric_unit("train/loss") == "nat");
  CHECK(metric_unit("student/val_loss") == "nat");
  CHECK(metric_unit("student/loss_scale").empty());
  CHECK(metric_unit("time/backward") == "s");
  CHECK(metric_unit("system/tps_per_rank") == "tokens/s");
  CHECK(metric_unit("student/lr").empty());
}

TEST_CASE("a plot for the terminal", "[plot]") {
  const std::vector<MetricSeries> lines = {series("train/loss", {4, 3, 2, 1})};
  const std::string plot =
      terminal_plot(lines, {.title = "demo", .log = false, .columns = 24, .rows = 5, .colors = false});
  CHECK(plot ==
        "demo\n"
        "   train/loss [nat]\n"
        "4 ┤⠒⠤⣀                 \n"
        "  │   ⠉⠒⠤⣀⡀            \n"
        "  │       ⠈⠑⠒⠤⢄⡀       \n"
        "2 ┤            ⠈⠉⠒⠤⣀   \n"
        "  │                 ⠉⠒⠤\n"
        "  └────────────────────\n"
        "         2            4\n"
        "   step\n");
}

TEST_CASE("lines of one unit share a plot where colours tell them apart", "[plot]") {
  const std::vector<MetricSeries> lines = {series("train/loss", {4, 3}), series("student/lr", {1, 2}),
                                           series("student/val_loss", {5, 1})};
  PlotOptions options{.title = "demo"};
  CHECK(occurrences(terminal_plot(lines, options), "└") == 2);
  options.colors = false;
  const std::string plain = terminal_plot(lines, options);
  CHECK(occurrences(plain, "└") == 3);
  CHECK(occurrences(plain, "\x1b") == 0);
  CHECK(occurrences(svg_plot(lines, options), ">step<") == 2);
}

TEST_CASE("what is not finite or not positive is left out", "[plot]") {
  const std::vector<MetricSeries> lines = {series("a", {1, std::nan(""), 2, inf, 0, -1, 3, 5})};
  PlotOptions options{.title = "demo"};
  const std::string linear = svg_plot(lines, options);
  CHECK(occurrences(linear, "<circle") == 6);
  CHECK(occurrences(linear, "<path") == 1);  // 0, -1, 3, 5; the others have no neighbour
  CHECK(occurrences(linear, "nan") == 0);
  CHECK(occurrences(linear, "inf") == 0);
  options.log = true;
  CHECK(occurrences(svg_plot(lines, options), "<circle") == 4);
  CHECK(terminal_plot(lines, options).find("logarithmic") != std::string::npos);
  const std::vector<MetricSeries> none = {series("b", {0, -1})};
  CHECK(refusal("", [&] { svg_plot(none, options); }) == "b: has no value that can be shown on a logarithmic axis");
  CHECK(refusal("", [&] {
          terminal_plot(std::vector{MetricSeries{"c", {}}}, {.title = ""});
        }) == "c: has no value that can be shown");
}

TEST_CASE("an SVG file of a long run is no larger than what can be seen", "[plot]") {
  MetricSeries line{"train/loss", {}};
  for (std::int64_t step = 1; step <= 200000; ++step)
    line.points.push_back({step, 0, std::sin(double(step)) + (step == 77777 ? 50 : 0)});
  const std::string svg = svg_plot(std::vector{line}, {.title = "a < b & c"});
  CHECK(svg.size() < 150000);
  CHECK(svg.find("a &lt; b &amp; c") != std::string::npos);
  CHECK(svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\""));
  CHECK(svg.ends_with("</svg>\n"));
  CHECK(occurrences(svg, "<text") == occurrences(svg, "</text>"));
  CHECK(svg.find(",70.6 ") != std::string::npos);  // the one outlier, 4% below the frame's top
}

TEST_CASE("one point is a plot as well", "[plot]") {
  const std::vector<MetricSeries> lines = {series("a", {7})};
  CHECK(occurrences(svg_plot(lines, {.title = ""}), "<circle") == 1);
  CHECK(!terminal_plot(lines, {.title = ""}).empty());
}
