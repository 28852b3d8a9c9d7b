#include "io/metric_sinks.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

#include "io/console_sink.h"
#include "io/csv_sink.h"
#include "test/support/limit.h"
#include "test/support/refusal.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using namespace distill::test;

namespace {
std::vector<std::string> flushed;  // names of files, in the order of the calls
bool disk_fails = false;

int flush(int file) {
  const auto path = std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(file));
  flushed.push_back(path.filename().string().substr(0, 11));
  if (disk_fails) errno = EIO;
  return disk_fails ? -1 : 0;
}
}  // namespace

extern "C" int fsync(int file) { return flush(file); }
extern "C" int fdatasync(int file) { return flush(file); }

namespace {

const std::vector<std::string> names = {"train/loss", "student/val_loss"};

MetricRecord record(std::int64_t step, double loss) {
  return {.step = step, .wall_time = 1000.25 + double(step), .values = {{"train/loss", loss}}};
}

std::string read(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

void no_warning(const std::string& message) { FAIL(message); }

const std::string header = "step,wall_time,train/loss,student/val_loss\n";

// What a run that resumes at `step` leaves of an older file.
std::string after_resume(const std::string& older, std::int64_t step) {
  const ScratchFolder folder;
  const std::string path = folder.write("metrics.csv", older);
  CsvSink sink(path, names, step, no_warning);
  return read(path);
}

}  // namespace

TEST_CASE("CSV: a line a step, complete at once, empty where there is no value", "[metric_sinks]") {
  const ScratchFolder folder;
  const std::string path = folder.path("metrics.csv");
  CsvSink sink(path, names, 0, no_warning);
  CHECK(read(path) == header);
  sink.write(record(1, 0.1));
  CHECK(read(path) == header + "1,1001.250,0.1,\n");
  sink.write({.step = 2, .wall_time = 3, .values = {{"student/val_loss", 1e-30}, {"train/loss", 1.0 / 3}}});
  const double inf = std::numeric_limits<double>::infinity();
  sink.write({.step = 3, .wall_time = 4, .values = {{"student/val_loss", -inf}, {"train/loss", std::nan("")}}});
  CHECK(read(path) == header + "1,1001.250,0.1,\n2,3.000,0.3333333333333333,1e-30\n3,4.000,nan,-inf\n");
  CHECK(refusal(
            "",
            [&] {
              sink.write({.step = 4, .wall_time = 0, .values = {{"new", 1}}});
            },
            ExitCode::internal)
            .starts_with("metric new has no column in "));
}

TEST_CASE("CSV: a resumed run goes on after the step it resumes from", "[metric_sinks]") {
  const std::string rows = "1,1.0,3,\n2,2.0,3,4\n3,3.0,3,\n";
  CHECK(after_resume(header + rows, 2) == header + "1,1.0,3,\n2,2.0,3,4\n");
  CHECK(after_resume(header + rows, 7) == header + rows);
  CHECK(after_resume(header + rows, 0) == header);
  CHECK(after_resume("", 5) == header);
  CHECK(after_resume(header + "1,1.0,3,\n2,2.0", 2) == header + "1,1.0,3,\n");              // killed while writing
  CHECK(after_resume(header + "1,1.0,3,\n2,2.0\n3,3.0,3,\n", 3) == header + "1,1.0,3,\n");  // torn in the middle
  CHECK(after_resume(header + "x,1.0,3,\n", 3) == header);
  const ScratchFolder folder;
  const std::string path = folder.write("metrics.csv", "step,wall_time,other\n1,2,3\n");
  CHECK(refusal(folder.path(), [&] { CsvSink(path, names, 1, no_warning); }) ==
        "metrics.csv: has other columns than this run writes; move the file away to go on with a new one");
  CHECK(read(path) == "step,wall_time,other\n1,2,3\n");
  CHECK(refusal(folder.path(), [&] { CsvSink(folder.path("no/metrics.csv"), names, 1, no_warning); }) ==
        "no/metrics.csv: cannot open: No such file or directory");
  CHECK(refusal("", [&] { CsvSink("/dev/null", names, 1, no_warning); }) == "/dev/null: cannot cut: Invalid argument");
}

TEST_CASE("CSV: a full disk loses lines but no columns, and is reported once", "[metric_sinks]") {
  const ScratchFolder folder;
  const std::string path = folder.path("metrics.csv");
  std::vector<std::string> warnings;
  {
    CsvSink sink(path, names, 0,
                 [&](const std::string& message) { warnings.push_back(without(message, folder.path())); });
    {
      const FileLimit full(header.size() + 5);
      sink.write(record(1, 2));
      sink.write(record(2, 2));
    }
    CHECK(read(path) == header);
    sink.write(record(3, 2));
  }
  CHECK(read(path) == header + "3,1003.250,2,\n");
  CHECK(warnings ==
        std::vector<std::string>{"metrics.csv: cannot write: File too large; metrics are missing from here on"});
}

TEST_CASE("CSV: columns read back as series, without what a kill tore", "[metric_sinks]") {
  const ScratchFolder folder;
  const std::string path = folder.path("metrics.csv");
  {
    CsvSink sink(path, names, 0, no_warning);
    sink.write({.step = 2, .wall_time = 3.5, .values = {{"train/loss", 1.0 / 3}}});
    sink.write({.step = 3, .wall_time = 4, .values = {{"train/loss", std::nan("")}, {"student/val_loss", -1e-300}}});
  }
  std::ofstream(path, std::ios::app) << "4,5.0,1";
  const auto series = read_csv_metrics(path);
  REQUIRE(series.size() == 2);
  CHECK(series[0].name == "train/loss");
  REQUIRE(series[0].points.size() == 2);
  CHECK(series[0].points[0].step == 2);
  CHECK(series[0].points[0].wall_time == 3.5);
  CHECK(series[0].points[0].value == 1.0 / 3);
  CHECK(std::isnan(series[0].points[1].value));
  REQUIRE(series[1].points.size() == 1);
  CHECK(series[1].points[0].step == 3);
  CHECK(series[1].points[0].value == -1e-300);
  const auto error_of = [&](const std::string& content) {
    folder.write("bad.csv", content);
    return refusal(folder.path(), [&] { read_csv_metrics(folder.path("bad.csv")); });
  };
  CHECK(error_of("") == "bad.csv: has no line of columns that begins with step,wall_time");
  CHECK(error_of("a,b\n") == "bad.csv: has no line of columns that begins with step,wall_time");
  CHECK(error_of(header + "1,2,3,\n1,2,3\n") == "bad.csv:3: is not a line of 4 numbers");
  CHECK(error_of(header + "1,2,x,\n") == "bad.csv:2: is not a line of 4 numbers");
}

TEST_CASE("track_with chooses the files", "[metric_sinks]") {
  const auto files = [](const std::vector<std::string>& track_with) {
    const ScratchFolder folder;
    for (const auto& sink : make_sinks(track_with, {.folder = folder.path(), .names = names, .warn = no_warning}))
      sink->write(record(1, 2));
    std::vector<std::string> found;
    for (const auto& entry : std::filesystem::directory_iterator(folder.path()))
      found.push_back(entry.path().filename().string().substr(0, 11));
    std::sort(found.begin(), found.end());
    return found;
  };
  using Files = std::vector<std::string>;
  CHECK(files({}).empty());
  CHECK(files({"csv"}) == Files{"metrics.csv"});
  CHECK(files({"tensorboard"}) == Files{"events.out."});
  CHECK(files({"tensorboard", "hdf5", "csv"}) == Files{"events.out.", "metrics.csv", "metrics.h5"});
}

TEST_CASE("every file is made durable when that is asked for; a disk that fails is reported once", "[metric_sinks]") {
  const ScratchFolder folder;
  std::vector<std::string> warnings;
  const auto sinks = make_sinks({"csv", "hdf5", "tensorboard"},
                                {.folder = folder.path(), .names = names, .warn = [&](const std::string& message) {
                                   warnings.push_back(message);
                                 }});
  const auto sync = [&] {
    flushed.clear();
    for (const auto& sink : sinks) sink->sync();
  };
  using Files = std::vector<std::string>;
  sync();
  CHECK(flushed == Files{"metrics.csv", "metrics.h5", "events.out."});
  disk_fails = true;
  sync();
  sync();
  disk_fails = false;
  CHECK(flushed.size() == 3);
  REQUIRE(warnings.size() == 3);
  CHECK(without(warnings[0], folder.path()) == "metrics.csv: cannot flush to the disk: Input/output error");
  CHECK(without(warnings[1], folder.path()) == "metrics.h5: cannot flush: Input/output error");
  sync();
  for (const auto& sink : sinks) sink->write(record(1, 2));
  CHECK(read(folder.path("metrics.csv")) == header + "1,1001.250,2,\n");
}

TEST_CASE("a record that lacks steps before the resumed one is told once", "[metric_sinks]") {
  const ScratchFolder folder;
  std::vector<std::string> warnings;
  const auto resume = [&](const std::vector<std::string>& track_with, std::int64_t step, std::int64_t last_record) {
    warnings.clear();
    make_sinks(track_with, {.folder = folder.path(),
                            .names = names,
                            .resumed_step = step,
                            .last_record = last_record,
                            .warn = [&](const std::string& m) { warnings.push_back(without(m, folder.path())); }});
    return warnings;
  };
  using Lines = std::vector<std::string>;
  const std::vector<std::string> all = {"csv", "hdf5", "tensorboard"};
  const std::string rows = "1,1.0,3,\n2,2.0,3,4\n4,3.0,3,\n";
  folder.write("metrics.csv", header + rows);
  CHECK(resume(all, 5, 4).empty());
  CHECK(resume(all, 4, 4).empty());
  CHECK(resume({"hdf5"}, 4, 4).empty());  // which was made from it
  CHECK(resume(all, 5, 0).empty());       // not known
  CHECK(resume(all, 6, 6) == Lines{"metrics.csv: lacks the records of steps 5 to 6 of the run that is resumed"});
  CHECK(resume({"hdf5"}, 6, 5) == Lines{"metrics.h5: lacks the records of steps 5 to 5 of the run that is resumed"});
  folder.write("metrics.csv", header + "1,1.0,3,\n2,2.0");  // torn
  CHECK(resume(all, 4, 4) == Lines{"metrics.csv: lacks the records of steps 2 to 4 of the run that is resumed"});
  std::filesystem::remove(folder.path("metrics.csv"));
  CHECK(resume({"csv"}, 4, 4) == Lines{"metrics.csv: lacks the records of steps 1 to 4 of the run that is resumed"});
  CHECK(resume({"tensorboard"}, 4, 4).empty());
  CHECK(resume(all, 0, 0).empty());
}

TEST_CASE("console: one line a record with units", "[metric_sinks]") {
  std::ostringstream out;
  double now = 50;
  ConsoleSink sink(out, false, 100, [&] { return now; });
  MetricRecord all{.step = 10,
                   .wall_time = 1e9,
                   .values = {{"train/loss", 2.5},
                              {"train/train_distill_loss", 1.25},
                              {"train/train_student_loss", 3.75},
                              {"student/lr", 5e-5},
                              {"student/grad_norm", 0.8125},
                              {"system/tps", 23456},
                              {"train/step_train", 0.5},
                              {"time/data_wait", 0.005},
                              {"time/teacher_wait", 0.1},
                              {"time/forward", 0.1},
                              {"time/loss", 0.045},
                              {"time/backward", 0.2},
                              {"time/reduce", 0},
                              {"time/optimizer", 0.05}}};
  sink.write(all);
  CHECK(out.str() ==
        "step 10/100 | loss 2.5000 | distill loss 1.2500 | student CE loss 3.7500 | lr 5e-05 | grad norm 0.812 | 23.5k "
        "tokens/s"
        " | step 500 ms (data 1%, teacher wait 20%, forward 20%, loss 9%, backward 40%, reduce 0%, optimizer 10%)"
        " | 45 s left\n");
  out.str("");
  now = 70;
  sink.write({.step = 20,
              .wall_time = 1e9 - 3600,  // the wall clock was set back meanwhile
              .values = {{"student/val_loss", 2.0}, {"student/loss_scale", 1024}, {"system/tps", 999}}});
  CHECK(out.str() == "step 20/100 | validation loss 2.0000 | loss scale 1024 | 999 tokens/s | 2 min 40 s left\n");
  out.str("");
  now = 80;
  sink.write({.step = 100, .wall_time = 0, .values = {}});
  CHECK(out.str() == "step 100/100\n");
}

TEST_CASE("console: a terminal has a progress bar below the lines", "[metric_sinks]") {
  std::ostringstream out;
  {
    ConsoleSink sink(out, true, 4, [] { return 10.0; });
    sink.write({.step = 1, .wall_time = 0, .values = {{"train/step_train", 20}}});
    CHECK(out.str() ==
          "\r\x1b[Kstep 1/4 | step 20.0 s | 1 min 0 s left\n[##########..............................] 25%, 1 min 0 s "
          "left");
    out.str("");
    sink.write({.step = 4, .wall_time = 0, .values = {}});
    CHECK(out.str() == "\r\x1b[Kstep 4/4\n[########################################] 100%, 0 s left");
    out.str("");
  }
  CHECK(out.str() == "\n");
}

TEST_CASE("durations", "[metric_sinks]") {
  CHECK(duration_text(0.4) == "0 s");
  CHECK(duration_text(59.4) == "59 s");
  CHECK(duration_text(59.6) == "1 min 0 s");
  CHECK(duration_text(3599) == "59 min 59 s");
  CHECK(duration_text(7384) == "2 h 3 min");
  CHECK(duration_text(90000) == "1 d 1 h");
  CHECK(duration_text(-5) == "0 s");
}
