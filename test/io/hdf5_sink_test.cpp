#include "io/hdf5_sink.h"

#include <fcntl.h>
#include <hdf5.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <optional>
#include <random>
#include <thread>

#include "io/csv_sink.h"
#include "io/hdf5.h"
#include "io/metric_sinks.h"
#include "test/support/child.h"
#include "test/support/limit.h"
#include "test/support/refusal.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using namespace distill::test;
namespace fs = std::filesystem;

namespace {

const std::vector<std::string> names = {"train/loss", "student/val_loss", "system/tps"};

std::vector<MetricSeries> nothing_yet() { return {{names[0], {}}, {names[1], {}}, {names[2], {}}}; }

void no_warning(const std::string& message) { FAIL(message); }

// Numbers with all their digits; the validation loss comes with every third step.
MetricRecord record(std::int64_t step) {
  MetricRecord r{.step = step,
                 .wall_time = 1.7e9 + double(step) / 1e3,
                 .values = {{"train/loss", 10 / std::sqrt(double(step))}, {"system/tps", 1e5 / double(step)}}};
  if (step % 3 == 0) r.values.emplace_back("student/val_loss", 1 / double(step));
  return r;
}

struct Point {
  std::int64_t step;
  double wall_time, value;
};

// The library's C interface and nothing of distill's.
std::vector<Point> points(hid_t file, const std::string& name) {
  const hid_t dataset = H5Dopen2(file, name.c_str(), H5P_DEFAULT), space = H5Dget_space(dataset),
              type = H5Tcreate(H5T_COMPOUND, sizeof(Point));
  REQUIRE(dataset >= 0);
  H5Tinsert(type, "value", offsetof(Point, value), H5T_NATIVE_DOUBLE);
  H5Tinsert(type, "step", offsetof(Point, step), H5T_NATIVE_INT64);
  H5Tinsert(type, "wall_time", offsetof(Point, wall_time), H5T_NATIVE_DOUBLE);
  std::vector<Point> out(std::size_t(H5Sget_simple_extent_npoints(space)));
  REQUIRE((out.empty() || H5Dread(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, out.data()) >= 0));
  H5Tclose(type);
  H5Sclose(space);
  H5Dclose(dataset);
  return out;
}

std::map<std::string, std::vector<Point>> read(const std::string& path, unsigned flags) {
  const hid_t file = H5Fopen(path.c_str(), flags, H5P_DEFAULT);
  REQUIRE(file >= 0);
  std::map<std::string, std::vector<Point>> out;
  for (const std::string& name : names) out[name] = points(file, name);
  H5Fclose(file);
  return out;
}
// As a constant it would be the library's first use, before distill has set it up.
unsigned while_written() {
  hdf5_version();
  return H5F_ACC_RDONLY | H5F_ACC_SWMR_READ;
}

// Steps that a metric's points reach: all of record(1), record(2), … and nothing else.
std::int64_t steps_in(const std::vector<Point>& all, const std::string& name) {
  std::int64_t step = 0;
  for (const Point& point : all) {
    step += name == "student/val_loss" ? 3 : 1;
    const MetricRecord expected = record(step);
    const auto value =
        std::find_if(expected.values.begin(), expected.values.end(), [&](const auto& v) { return v.first == name; });
    REQUIRE(point.step == step);
    REQUIRE(point.wall_time == std::round(expected.wall_time * 1e3) / 1e3);
    REQUIRE(point.value == value->second);
  }
  return step;
}

// A process that writes records until it is killed and says so after each.
class Writer {
 public:
  explicit Writer(const std::string& path) {
    REQUIRE(pipe2(ends_, O_NONBLOCK) == 0);
    process_.emplace([&] {
      Hdf5Sink sink(path, nothing_yet(), [](const std::string&) { _exit(2); });
      for (std::int64_t step = 1;; ++step) {
        sink.write(record(step));
        if (::write(ends_[1], "x", 1) != 1) _exit(3);
      }
    });
  }
  ~Writer() {
    for (const int end : ends_) close(end);
  }
  // Records that are written, as far as the process has said.
  std::int64_t written() {
    char part[4096];
    for (ssize_t n; (n = ::read(ends_[0], part, sizeof part)) > 0;) written_ += n;
    return written_;
  }
  void wait_for(std::int64_t records) {
    for (int i = 0; written() < records; ++i) {
      REQUIRE(i < 30000);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  void kill() { process_.reset(); }

 private:
  int ends_[2];
  std::int64_t written_ = 0;
  std::optional<Child> process_;
};

bool same(double a, double b) { return std::memcmp(&a, &b, sizeof a) == 0; }

}  // namespace

TEST_CASE("metrics.h5 of a finished run opens like any other file", "[hdf5_sink]") {
  const ScratchFolder folder;
  const std::string path = folder.path("metrics.h5");
  {
    Hdf5Sink sink(path, nothing_yet(), no_warning);
    for (std::int64_t step = 1; step <= 500; ++step) sink.write(record(step));
    CHECK(refusal(
              "",
              [&] {
                sink.write({.step = 4, .wall_time = 0, .values = {{"new", 1}}});
              },
              ExitCode::internal)
              .starts_with("metric new has no dataset in "));
  }
  auto all = read(path, H5F_ACC_RDONLY);
  CHECK(steps_in(all["train/loss"], "train/loss") == 500);
  CHECK(steps_in(all["student/val_loss"], "student/val_loss") == 498);
  const auto series = read_hdf5_metrics(path);
  REQUIRE(series.size() == 3);
  CHECK(series[1].name == "student/val_loss");
  CHECK(series[1].points.size() == 166);
  CHECK(series[0].points.back().value == 10 / std::sqrt(500.0));
  CHECK(!fs::exists(path + ".partial"));
}

TEST_CASE("metrics.h5 is read by another process while it is written", "[hdf5_sink]") {
  const ScratchFolder folder;
  const std::string path = folder.path("metrics.h5");
  Writer writer(path);
  writer.wait_for(1);
  std::int64_t before = 0;
  for (int look = 0; look < 40; ++look) {
    const std::int64_t written = writer.written();
    auto all = read(path, while_written());
    const std::int64_t steps = steps_in(all["train/loss"], "train/loss");
    CHECK(steps >= written);
    CHECK(steps >= before);
    steps_in(all["student/val_loss"], "student/val_loss");
    CHECK(read_hdf5_metrics(path)[0].points.size() >= std::size_t(steps));
    before = steps;
    writer.wait_for(written + 5);
  }
  // A reader that keeps the file open sees it grow.
  const hid_t file = H5Fopen(path.c_str(), while_written(), H5P_DEFAULT),
              dataset = H5Dopen2(file, "train/loss", H5P_DEFAULT);
  writer.wait_for(writer.written() + 300);
  REQUIRE(H5Drefresh(dataset) >= 0);
  CHECK(steps_in(points(file, "train/loss"), "train/loss") >= before + 300);
  H5Dclose(dataset);
  H5Fclose(file);
}

TEST_CASE("metrics.h5 holds every written record when its writer is killed", "[hdf5_sink]") {
  std::mt19937 random(7);
  for (int round = 0; round < 20; ++round) {
    const ScratchFolder folder;
    const std::string path = folder.path("metrics.h5");
    Writer writer(path);
    writer.wait_for(1);
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 60000));
    writer.kill();
    const std::int64_t written = writer.written();
    auto all = read(path, while_written());
    INFO("killed after record " << written);
    for (const char* name : {"train/loss", "system/tps"}) {
      const std::int64_t steps = steps_in(all[name], name);
      CHECK(steps >= written);
      CHECK(steps <= written + 1);
    }
    CHECK(steps_in(all["student/val_loss"], "student/val_loss") >= written / 3 * 3);
  }
}

TEST_CASE("a resumed run rebuilds metrics.h5 from metrics.csv, equal to the last digit", "[hdf5_sink]") {
  const ScratchFolder folder;
  const double inf = std::numeric_limits<double>::infinity();
  const auto sinks_at = [&](std::int64_t step, std::vector<std::string> track_with = {"hdf5", "csv"}) {
    return make_sinks(track_with, {.folder = folder.path(), .names = names, .resumed_step = step, .warn = no_warning});
  };
  {
    const auto sinks = sinks_at(0);
    REQUIRE(sinks.size() == 2);
    for (const auto& sink : sinks) {
      sink->write({.step = 1, .wall_time = 1.7e9 + 0.12345, .values = {{"train/loss", 1.0 / 3}, {"system/tps", inf}}});
      sink->write({.step = 2, .wall_time = 1.7e9 + 2, .values = {{"student/val_loss", 4.9e-324}}});
      for (std::int64_t step = 3; step < 40; ++step) sink->write(record(step));
    }
  }
  std::ofstream(folder.path("metrics.csv"), std::ios::app) << "40,17";  // killed while it wrote
  const auto check_equal = [&](std::int64_t last) {
    auto h5 = read(folder.path("metrics.h5"), while_written());
    for (const MetricSeries& series : read_csv_metrics(folder.path("metrics.csv"))) {
      INFO(series.name);
      const std::vector<Point>& stored = h5[series.name];
      REQUIRE(stored.size() == series.points.size());
      for (std::size_t i = 0; i < stored.size(); ++i) {
        CHECK(stored[i].step == series.points[i].step);
        CHECK(same(stored[i].wall_time, series.points[i].wall_time));
        CHECK(same(stored[i].value, series.points[i].value));
      }
      CHECK(stored.back().step <= last);
    }
    CHECK(h5["train/loss"].back().step == last);
  };
  check_equal(39);
  sinks_at(20);
  check_equal(20);
  for (const auto& sink : sinks_at(20)) sink->write(record(21));
  check_equal(21);
  fs::remove(folder.path("metrics.h5"));
  sinks_at(21);
  check_equal(21);
  // Without metrics.csv the older metrics.h5 is all there is.
  CHECK(sinks_at(15, {"hdf5"}).size() == 1);
  auto h5 = read(folder.path("metrics.h5"), while_written());
  CHECK(h5["train/loss"].size() == 14);  // step 2 had none
  CHECK(same(h5["train/loss"].front().value, 1.0 / 3));
}

TEST_CASE("a metrics.h5 that cannot be read is reported and begun anew", "[hdf5_sink]") {
  const ScratchFolder folder;
  folder.write("metrics.h5", "no HDF5");
  std::vector<std::string> warnings;
  make_sinks({"hdf5"}, {.folder = folder.path(), .names = names, .resumed_step = 7, .warn = [&](auto& w) {
                          warnings.push_back(without(w, folder.path()));
                        }});
  REQUIRE(warnings.size() == 1);
  CHECK(warnings[0].starts_with("metrics.h5: cannot read: "));
  CHECK(warnings[0].ends_with("; a new file begins after step 7"));
  CHECK(read(folder.path("metrics.h5"), H5F_ACC_RDONLY)["train/loss"].empty());
}

TEST_CASE("a full disk ends metrics.h5, not the run", "[hdf5_sink]") {
  const ScratchFolder folder;
  const std::string path = folder.path("metrics.h5");
  std::vector<std::string> warnings;
  {
    Hdf5Sink sink(path, nothing_yet(),
                  [&](const std::string& message) { warnings.push_back(without(message, folder.path())); });
    sink.write(record(1));
    {
      const FileLimit full(fs::file_size(path));
      for (std::int64_t step = 2; step < 1000; ++step) sink.write(record(step));
    }
    sink.write(record(1000));
  }
  REQUIRE(warnings.size() == 1);
  CHECK(warnings[0].starts_with("metrics.h5: cannot write: "));
  CHECK(warnings[0].find("; the file ends before step ") != std::string::npos);
  auto all = read(path, while_written());
  CHECK(steps_in(all["train/loss"], "train/loss") >= 1);
  Hdf5Sink(path, nothing_yet(), no_warning).write(record(1));  // the next start
  CHECK(read(path, while_written())["train/loss"].size() == 1);
}
