#include "io/run_folder.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cerrno>
#include <filesystem>

#include "test/support/refusal.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using namespace distill::test;

namespace {
void no_warning(const std::string& message) { FAIL(message); }
int refusing = 0;  // with this error; 0: not at all
}  // namespace

extern "C" int flock(int file, int operation) noexcept {
  if (refusing == 0) return int(syscall(SYS_flock, file, operation));
  errno = refusing;
  return -1;
}

TEST_CASE("one run at a time uses a folder", "[run_folder]") {
  const ScratchFolder scratch;
  const std::string path = scratch.path("out/run");
  {
    const RunFolder mine(path, {}, no_warning);
    CHECK(mine.file("config.yaml") == path + "/config.yaml");
    const std::string message = refusal(scratch.path(), [&] { const RunFolder other(path, {}, no_warning); });
    CHECK(message.starts_with(text("out/run: is in use by process ", getpid(), " on ")));
    CHECK(message.ends_with("; wait for that run, stop it, or choose another exp_name"));
  }
  CHECK_NOTHROW(RunFolder(path, {}, no_warning));
  scratch.write("file", "");
  CHECK(refusal(scratch.path(), [&] { const RunFolder other(scratch.path("file/run"), {}, no_warning); }) ==
        "file/run: cannot create: Not a directory");
  std::filesystem::create_directories(scratch.path("odd/.lock"));
  CHECK(refusal(scratch.path(), [&] { const RunFolder other(scratch.path("odd"), {}, no_warning); }) ==
        "odd/.lock: cannot open: Is a directory");
}

TEST_CASE("one run at a time uses any of the folders that it writes into", "[run_folder]") {
  const ScratchFolder scratch;
  const std::string run = scratch.path("out/a"), logs = scratch.path("logs/a"), checkpoints = scratch.path("disk/a");
  const auto refused = [&](const std::string& path, const std::vector<std::string>& others) {
    const std::string message = refusal(scratch.path(), [&] { const RunFolder other(path, others, no_warning); });
    return message.substr(0, message.find(" on "));
  };
  const std::string holder = text(": is in use by process ", getpid());
  {
    const RunFolder mine(run, {checkpoints, logs}, no_warning);
    CHECK(refused(scratch.path("out/b"), {scratch.path("disk/b"), logs}) == "logs/a" + holder);
    CHECK(refused(scratch.path("out/b"), {checkpoints, scratch.path("logs/b")}) == "disk/a" + holder);
    CHECK(refused(logs, {}) == "logs/a" + holder);
    CHECK(refused(scratch.path("out/b"), {run}) == "out/a" + holder);
    // Who was refused holds nothing.
    CHECK_NOTHROW(RunFolder(scratch.path("out/b"), {scratch.path("disk/b"), scratch.path("logs/b")}, no_warning));
  }
  CHECK_NOTHROW(RunFolder(scratch.path("out/b"), {checkpoints, logs}, no_warning));
}

TEST_CASE("a folder with several names is no other run's", "[run_folder]") {
  const ScratchFolder scratch;
  std::filesystem::create_directories(scratch.path("out/a"));
  std::filesystem::create_directory_symlink(scratch.path("out"), scratch.path("link"));
  const RunFolder mine(scratch.path("out/a"), {scratch.path("out/a"), scratch.path("link/../link/a")}, no_warning);
  CHECK_THROWS(RunFolder(scratch.path("link/a"), {}, no_warning));
}

TEST_CASE("a file system without locks is warned of, for each folder", "[run_folder]") {
  const ScratchFolder scratch;
  std::vector<std::string> warnings;
  refusing = EOPNOTSUPP;
  {
    const RunFolder folder(scratch.path("run"), {scratch.path("logs")},
                           [&](const std::string& message) { warnings.push_back(without(message, scratch.path())); });
    refusing = 0;
    CHECK(std::filesystem::exists(folder.path()));
  }
  REQUIRE(warnings.size() == 2);
  CHECK(warnings[0] ==
        "run: cannot be locked (Operation not supported): nothing keeps a second run from writing into it");
  CHECK(warnings[1].starts_with("logs: cannot be locked"));
}

TEST_CASE("a finished run leaves a mark", "[run_folder]") {
  const ScratchFolder scratch;
  const RunFolder folder(scratch.path("run"), {}, no_warning);
  folder.clear_finished();
  CHECK_FALSE(std::filesystem::exists(folder.file("finished")));
  folder.mark_finished(7);
  CHECK(std::filesystem::exists(folder.file("finished")));
  folder.clear_finished();
  CHECK_FALSE(std::filesystem::exists(folder.file("finished")));
}
