// What a run meets with on real machines: a full disk, damaged checkpoints, folders that cannot be written, clocks that
// jump, outliers. It ends with a message and an exit code that fit, and the next run goes on as if nothing had
// happened.
#include <catch2/catch.hpp>
#include <chrono>
#include <filesystem>
#include <functional>
#include <optional>
#include <thread>

#include "io/checkpoint_manifest.h"
#include "test/support/limit.h"
#include "test/support/small_disk.h"
#include "test/support/workshop.h"

using namespace distill::test;
namespace fs = std::filesystem;

namespace {

// A run without a teacher whose steps do not depend on how many there are to be.
Words plain(int steps, const Words& more = {}) {
  Words words{"distill_loss_weight=0", "student.training_args.lr_scheduler_type=constant", "eval_steps=0",
              "resume_from_checkpoint=true", "max_steps=" + std::to_string(steps)};
  words.insert(words.end(), more.begin(), more.end());
  return words;
}

Process::Result train(const Workshop& shop, const std::string& name, const Words& words, int code = 0) {
  const auto result = shop.train(name, words);
  INFO(result.output);
  CHECK(result.code == code);
  return result;
}

void wait_for_steps(const Workshop& shop, const std::string& name, std::size_t steps) {
  const fs::path csv = shop.path("logs/" + name + "/metrics.csv");
  for (int i = 0; i < 3000 && !(fs::exists(csv) && shop.losses(name).size() >= steps); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  REQUIRE(shop.losses(name).size() >= steps);
}

}  // namespace

TEST_CASE("a disk that is full loses the checkpoint that is being written and no other", "[faults]") {
  const Workshop shop;
  const std::uint64_t plenty = 64 << 20;
  fs::create_directory(shop.path("disk"));
  SmallDisk disk(shop.path("disk"), plenty);
  const Words on_disk{"output_dir=" + shop.path("disk")};
  train(shop, "whole", plain(6));
  train(shop, "full", plain(4, on_disk));
  const std::string checkpoints = shop.path("disk/full/checkpoints/");
  const std::uint64_t shard = fs::file_size(checkpoints + "step-000004/student-pp0-tp0-dp0.h5");
  {
    std::optional<FileLimit> limit;  // where the machine does not let us mount
    disk.is_there() ? disk.resize(disk.used() + shard / 2) : void(limit.emplace(shard / 2));
    const auto result = train(shop, "full", plain(6, on_disk), 1);
    CHECK(occurrences(result.output, ": cannot write ") == 1);
    CHECK_THAT(result.output, Catch::Contains("resumed from " + checkpoints + "step-000004") &&
                                  Catch::Contains(disk.is_there() ? "No space left on device" : "File too large"));
    CHECK_FALSE(fs::exists(checkpoints + "step-000006"));
  }
  if (disk.is_there()) disk.resize(plenty);
  const auto result = train(shop, "full", plain(6, on_disk));
  CHECK_THAT(result.output, Catch::Contains("resumed from " + checkpoints + "step-000004"));
  CHECK(shop.losses("full") == shop.losses("whole"));
  CHECK(contents(shop.path("disk/full/export/model.safetensors")) == shop.weights("whole"));
}

TEST_CASE("a damaged newest checkpoint is named and the one before it is used", "[faults]") {
  const Workshop shop;
  train(shop, "whole", plain(6));
  train(shop, "short", plain(4));
  const std::string folder = "hurt/checkpoints/step-000004/", shard = folder + "student-pp0-tp0-dp0.h5";
  struct Damage {
    std::string reason;
    std::function<void()> work;
  };
  for (const Damage& damage : {
           Damage{"has no manifest.json", [&] { fs::remove(shop.path(folder + "manifest.json")); }},
           Damage{"lacks student-pp0-tp0-dp0.h5", [&] { fs::remove(shop.path(shard)); }},
           Damage{"bytes, its manifest says ",
                  [&] { fs::resize_file(shop.path(shard), fs::file_size(shop.path(shard)) - 1); }},
           Damage{" is damaged (its checksum does not match)",
                  [&] {
                    std::string bytes = contents(shop.path(shard));
                    bytes[bytes.size() / 2] ^= 1;
                    shop.write(shard, bytes);
                  }},
       }) {
    CAPTURE(damage.reason);
    for (const std::string where : {"", "logs/"}) {
      fs::remove_all(shop.path(where + "hurt"));
      fs::copy(shop.path(where + "short"), shop.path(where + "hurt"), fs::copy_options::recursive);
    }
    damage.work();
    const auto result = train(shop, "hurt", plain(6));
    CHECK(occurrences(result.output, "warning: checkpoint passed over: ") == 1);
    CHECK_THAT(result.output, Catch::Contains(damage.reason) &&
                                  Catch::Contains("resumed from " + shop.path("hurt/checkpoints/step-000002")));
    CHECK(shop.losses("hurt") == shop.losses("whole"));
    CHECK(shop.weights("hurt") == shop.weights("whole"));
  }
}

TEST_CASE("a state of which there is no room for a copy is an error before the first step", "[faults][preload]") {
  const Workshop shop;
  train(shop, "whole", plain(2));
  std::uint64_t bytes = 0;
  for (const auto& shard : distill::read_manifest(shop.path("whole/checkpoints/step-000002")).shards)
    for (const auto& dataset : shard.datasets) bytes += dataset.range.bytes;
  Words words{"LD_PRELOAD=" DISTILL_NO_MEMORY, "NO_MEMORY_BYTES=" + std::to_string(bytes)};
  const Words training = shop.training("short", plain(2, {"save_steps=0"}), 0);
  words.insert(words.end(), training.begin(), training.end());
  const auto result = Process(words).wait();
  INFO(result.output);
  CHECK(result.code == 2);
  CHECK(occurrences(result.output, "distill: the copy of the state that checkpoints are written from: out of memory: " +
                                       std::to_string(bytes) + " bytes asked for\n") == 1);
  CHECK_FALSE(fs::exists(shop.path("logs/short/metrics.csv")));
}

TEST_CASE("a file system that is read-only is said before anything starts", "[faults]") {
  const Workshop shop;
  fs::create_directory(shop.path("disk"));
  SmallDisk disk(shop.path("disk"), 1 << 20);
  if (!disk.is_there()) {
    WARN("not tried: this machine does not let us mount");
    return;
  }
  disk.make_read_only(1 << 20);
  for (const std::string key : {"output_dir", "logging_dir", "checkpoint_config.output_dir"}) {
    const auto result = train(shop, "closed", plain(2, {key + "=" + shop.path("disk")}), 2);
    CHECK(occurrences(result.output, "': " + key + ": cannot write to " + shop.path("disk/closed")) == 1);
    CHECK_THAT(result.output, Catch::Contains("Read-only file system"));
    CHECK_FALSE(fs::exists(shop.path("closed")));
  }
}

TEST_CASE("a wall clock that jumps changes nothing", "[faults][preload]") {
  const Workshop shop;
  train(shop, "whole", plain(8));
  const auto with_jump = [&](const std::string& name, const std::string& seconds, const Words& words) {
    Words all{"LD_PRELOAD=" DISTILL_CLOCK_JUMP, "CLOCK_JUMP_FILE=" + shop.path("jump"),
              "CLOCK_JUMP_SECONDS=" + seconds};
    const Words training = shop.training(name, words, 0);
    all.insert(all.end(), training.begin(), training.end());
    return all;
  };
  // A day back in the middle of the run, and all of the next one.
  {
    Process run(with_jump("back", "-86400", plain(4, {"save_steps=1"})));
    wait_for_steps(shop, "back", 1);
    shop.write("jump", "");
    const auto result = run.wait();
    INFO(result.output);
    REQUIRE(result.code == 0);
  }
  const auto result = Process(with_jump("back", "-86400", plain(6))).wait();
  INFO(result.output);
  REQUIRE(result.code == 0);
  CHECK_THAT(result.output, Catch::Contains("resumed from " + shop.path("back/checkpoints/step-000004")));
  const auto times = column(shop.path("logs/back/metrics.csv"), "wall_time");
  CHECK(std::stod(times.back()) < std::stod(times.front()) - 80000);  // the clock did jump
  // A clock that is right again: what was written last is still the newest.
  const auto last = train(shop, "back", plain(8));
  CHECK_THAT(last.output, Catch::Contains("resumed from " + shop.path("back/checkpoints/step-000006")));
  CHECK(shop.losses("back") == shop.losses("whole"));
  CHECK(shop.weights("back") == shop.weights("whole"));
  CHECK(Process(shop.command({"metrics", shop.path("logs/back")})).wait().code == 0);
  // A day ahead is not a time limit.
  fs::remove(shop.path("jump"));
  Process run(with_jump("ahead", "86400", plain(8, {"max_time=1h"})));
  wait_for_steps(shop, "ahead", 1);
  shop.write("jump", "");
  CHECK(run.wait().code == 0);
  CHECK(shop.losses("ahead") == shop.losses("whole"));
}

TEST_CASE("of two runs in one folder the second is told who holds it, and starts at once when that is killed",
          "[faults]") {
  const Workshop shop;
  Process first(shop.training("shared", plain(100000)));
  wait_for_steps(shop, "shared", 4);
  const std::string holder = contents(shop.path("shared/.lock"));
  CHECK(holder.starts_with("process "));
  const auto refused = train(shop, "shared", plain(100000), 2);
  CHECK(occurrences(refused.output, shop.path("shared") + ": is in use by " + holder + "; wait for that run") == 1);
  // Other folders, but one of those that the first run writes into.
  const std::string elsewhere = "output_dir=" + shop.path("elsewhere");
  const auto logs = train(shop, "shared", plain(100000, {elsewhere}), 2);
  CHECK(occurrences(logs.output, shop.path("logs/shared") + ": is in use by " + holder + "; wait for that run") == 1);
  const auto checkpoints = train(shop, "shared",
                                 plain(100000, {elsewhere, "logging_dir=" + shop.path("other-logs"),
                                                "checkpoint_config.output_dir=" + shop.path("")}),
                                 2);
  CHECK(occurrences(checkpoints.output, shop.path("shared") + ": is in use by " + holder) == 1);
  CHECK_FALSE(fs::exists(shop.path("other-logs/shared/metrics.csv")));
  CHECK(first.is_running());
  first.signal(SIGKILL);
  CHECK(first.wait().code == 128 + SIGKILL);
  const int done = int(shop.losses("shared").size());
  const auto next = train(shop, "shared", plain(done + 1));
  CHECK_THAT(next.output, Catch::Contains("resumed from " + shop.path("shared/checkpoints/step-")));
}

TEST_CASE("metrics that a loss of power took are told, and the run goes on", "[faults]") {
  const Workshop shop;
  train(shop, "gap", plain(5, {"logging_steps=3", "save_steps=5"}));
  const std::string csv = "logs/gap/metrics.csv", lines = contents(shop.path(csv));
  CHECK(shop.losses("gap").size() == 2);  // of steps 3 and 5
  shop.write(csv, lines.substr(0, lines.rfind('\n', lines.size() - 2) + 1));
  const auto result = train(shop, "gap", plain(6));
  CHECK(occurrences(result.output, "warning: " + shop.path(csv) +
                                       ": lacks the records of steps 4 to 5 of the run that is resumed\n") == 1);
  CHECK(occurrences(result.output, "warning: ") == 1);
  CHECK(column(shop.path(csv), "step") == Words{"3", "6"});
  // Nothing is missing where the resumed step is not one of those that are logged.
  const std::string middle = "resume_from_checkpoint=" + shop.path("sparse/checkpoints/step-000003");
  train(shop, "sparse", plain(6, {"logging_steps=2", "save_steps=3"}));
  CHECK_THAT(train(shop, "sparse", plain(6, {"logging_steps=2", middle})).output,
             !Catch::Contains("warning: ") && Catch::Contains("resumed from "));
  CHECK(column(shop.path("logs/sparse/metrics.csv"), "step") == Words{"2", "4", "6"});
}

TEST_CASE("a resume with other training data says so in one line and goes on", "[faults]") {
  const Workshop shop;
  train(shop, "data", plain(2));
  const auto said = [&](const std::string& output) {
    return occurrences(output, ": was written with other training data (60 records of ");
  };
  // The same records, encoded beforehand, by another name.
  shop.write("same.jsonl", contents(shop.path("train.jsonl")));
  const std::string same = "student.data_args.file_name=" + shop.path("same.jsonl");
  const auto encoded = Process(shop.command({"encode", "--config", shop.path("run.yaml"), same})).wait();
  CHECK(encoded.code == 0);
  const auto unchanged = train(shop, "data", plain(3, {same}));
  CHECK_THAT(unchanged.output, Catch::Contains("; from ") && Catch::Contains("resumed from "));
  CHECK(said(unchanged.output) == 0);
  // The same ones in another order.
  const std::string lines = contents(shop.path("train.jsonl"));
  const std::size_t second = lines.find('\n') + 1;
  shop.write("turned.jsonl", lines.substr(second) + lines.substr(0, second));
  const std::string turned = "student.data_args.file_name=" + shop.path("turned.jsonl");
  Words check = plain(4, {turned, "exp_name=data"});
  check.insert(check.begin(), {"check", "--config", shop.path("run.yaml")});
  CHECK(said(Process(shop.command(check)).wait().output) == 1);
  const auto changed = train(shop, "data", plain(4, {turned}));
  CHECK(said(changed.output) == 1);
  CHECK_THAT(changed.output, Catch::Contains("; this run: 60 records of ") &&
                                 Catch::Contains("the order of the data is not the interrupted run's\n"));
}

TEST_CASE("SIGINT and SIGTERM save and leave with 85", "[faults]") {
  const Workshop shop;
  const int number = GENERATE(SIGINT, SIGTERM);
  CAPTURE(number);
  Process run(shop.training("stopped", plain(100000, {"save_steps=0"})));
  wait_for_steps(shop, "stopped", 2);
  run.signal(number);
  const auto result = run.wait();
  INFO(result.output);
  CHECK(result.code == 85);
  CHECK_THAT(result.output, Catch::Contains("stopped by a signal after step"));
  const std::size_t steps = shop.losses("stopped").size();
  CHECK(std::distance(fs::directory_iterator(shop.path("stopped/checkpoints")), fs::directory_iterator()) == 1);
  const auto next = train(shop, "stopped", plain(int(steps) + 1));
  CHECK_THAT(next.output, Catch::Contains("after step " + std::to_string(steps)));
}

TEST_CASE("an outlier stops a run where that is wanted, and it can go on from before it", "[faults]") {
  const Workshop shop;
  shop.make_teacher();
  const int ranks = GENERATE(0, 2);
  const auto run = [&](const std::string& name, Words words, int code) {
    words.insert(words.begin(), {"max_steps=12", "save_steps=0", "resume_from_checkpoint=true",
                                 "student.training_args.learning_rate=0.02"});
    const auto result = shop.train(name, words, ranks);
    INFO(result.output);
    CHECK(result.code == code);
    return result.output;
  };
  run("whole", {}, 0);
  // Any rise is an outlier.
  const Words sensitive{"outlier_window=2", "outlier_zscore=0.001"};
  const auto with = [&](const std::string& action) {
    Words words = sensitive;
    words.push_back("outlier_action=" + action);
    return words;
  };
  const std::string stopped = run("watched", with("stop"), 4);
  CHECK(occurrences(stopped, " (outlier_action: stop); the state after step ") == 1);
  CHECK_FALSE(fs::exists(shop.path("watched/finished")));
  const std::string warned = run("watched", with("warn"), 0);
  CHECK_THAT(warned, Catch::Contains("resumed from ") && Catch::Contains("warning: step ") &&
                         Catch::Contains(" is an outlier: z-score "));
  CHECK(shop.losses("watched") == shop.losses("whole"));
  CHECK(shop.weights("watched") == shop.weights("whole"));
}
