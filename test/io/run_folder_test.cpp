#include "io/run_folder.h"

#include <unistd.h>

#include <catch2/catch.hpp>
#include <filesystem>

#include "test/support/refusal.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using namespace distill::test;

TEST_CASE("one run at a time uses a folder", "[run_folder]") {
  const ScratchFolder scratch;
  const std::string path = scratch.path("out/run");
  {
    const RunFolder mine(path);
    CHECK(mine.file("config.yaml") == path + "/config.yaml");
    const std::string message = refusal(scratch.path(), [&] { const RunFolder other(path); });
    CHECK(message.starts_with(text("out/run: is in use by process ", getpid(), " on ")));
    CHECK(message.ends_with("; wait for that run, stop it, or choose another exp_name"));
  }
  CHECK_NOTHROW(RunFolder{path});
  scratch.write("file", "");
  CHECK(refusal(scratch.path(), [&] { const RunFolder other(scratch.path("file/run")); }) ==
        "file/run: cannot create: Not a directory");
  std::filesystem::create_directories(scratch.path("odd/.lock"));
  CHECK(refusal(scratch.path(), [&] { const RunFolder other(scratch.path("odd")); }) ==
        "odd/.lock: cannot open: Is a directory");
}

TEST_CASE("one run at a time uses any of the folders that it writes into", "[run_folder]") {
  const ScratchFolder scratch;
  const std::string run = scratch.path("out/a"), logs = scratch.path("logs/a"), checkpoints = scratch.path("disk/a");
  const auto refused = [&](const std::string& path, const std::vector<std::string>& others) {
    const std::string message = refusal(scratch.path(), [&] { const RunFolder other(path, others); });
    return message.substr(0, message.find(" on "));
  };
  const std::string holder = text(": is in use by process ", getpid());
  {
    const RunFolder mine(run, {checkpoints, logs});
    CHECK(refused(scratch.path("out/b"), {scratch.path("disk/b"), logs}) == "logs/a" + holder);
    CHECK(refused(scratch.path("out/b"), {checkpoints, scratch.path("logs/b")}) == "disk/a" + holder);
    CHECK(refused(logs, {}) == "logs/a" + holder);
    CHECK(refused(scratch.path("out/b"), {run}) == "out/a" + holder);
    // Who was refused holds nothing.
    CHECK_NOTHROW(RunFolder(scratch.path("out/b"), {scratch.path("disk/b"), scratch.path("logs/b")}));
  }
  CHECK_NOTHROW(RunFolder(scratch.path("out/b"), {checkpoints, logs}));
}

TEST_CASE("a folder with several names is no other run's", "[run_folder]") {
  const ScratchFolder scratch;
  std::filesystem::create_directories(scratch.path("out/a"));
  std::filesystem::create_directory_symlink(scratch.path("out"), scratch.path("link"));
  const RunFolder mine(scratch.path("out/a"), {scratch.path("out/a"), scratch.path("link/../link/a")});
  CHECK_THROWS(RunFolder(scratch.path("link/a")));
}

TEST_CASE("a finished run leaves a mark", "[run_folder]") {
  const ScratchFolder scratch;
  const RunFolder folder(scratch.path("run"));
  folder.clear_finished();
  CHECK_FALSE(std::filesystem::exists(folder.file("finished")));
  folder.mark_finished(7);
  CHECK(std::filesystem::exists(folder.file("finished")));
  folder.clear_finished();
  CHECK_FALSE(std::filesystem::exists(folder.file("finished")));
}
