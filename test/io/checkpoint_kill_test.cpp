// A checkpoint that takes the place of an older one of the same step, killed before each call that changes the disk:
// there is always one of the two, whole.
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "io/checkpoint_reader.h"
#include "io/checkpoint_writer.h"
#include "io/durable_file.h"
#include "test/support/child.h"
#include "test/support/refusal.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using namespace distill::test;
namespace fs = std::filesystem;
using Lines = std::vector<std::string>;

namespace {

std::atomic<int> calls_to_live = -1;  // below 0: for ever
std::atomic<bool> can_exchange = true;
constexpr int killed = 137;

void live_on() {
  if (calls_to_live >= 0 && calls_to_live-- == 0) _exit(killed);
}

}  // namespace

// What the program and the C++ library call.
extern "C" {
int renameat2(int from_folder, const char* from, int to_folder, const char* to, unsigned flags) noexcept {
  live_on();
  if (flags == RENAME_EXCHANGE && !can_exchange) {
    errno = EINVAL;
    return -1;
  }
  return int(syscall(SYS_renameat2, from_folder, from, to_folder, to, flags));
}
int rename(const char* from, const char* to) noexcept { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }
int unlinkat(int folder, const char* path, int flags) noexcept {
  live_on();
  return int(syscall(SYS_unlinkat, folder, path, flags));
}
int unlink(const char* path) noexcept { return unlinkat(AT_FDCWD, path, 0); }
int fsync(int) {  // the disk itself, which takes long, is not what is tried here
  live_on();
  return 0;
}
ssize_t pwrite(int file, const void* bytes, std::size_t count, off_t at) {
  live_on();
  return syscall(SYS_pwrite64, file, bytes, count, at);
}
}

namespace {

constexpr std::int64_t columns = 1000;

Lines names_in(const fs::path& folder) {
  Lines names;
  for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

void save(const std::string& folder, std::int64_t step, float value, int keep) {
  Alone alone;
  CheckpointWriter writer(folder, {}, {}, keep, alone, [](const std::string&) {});
  const StoredMatrix whole{.name = "values/w", .rows = 1, .cols = columns, .whole_rows = 1, .whole_cols = columns};
  writer.save({.step = step}, {whole}, [&](std::size_t, std::span<std::byte> to) {
    for (std::size_t i = 0; i < to.size(); i += sizeof value) std::memcpy(&to[i], &value, sizeof value);
  });
  writer.finish();
}

// The value that all elements of a whole checkpoint have.
float value_in(const std::string& path) {
  CheckpointReader reader(path, read_manifest(path));
  for (const StoredShard& shard : reader.manifest().shards) check_shard(path, shard);
  std::vector<float> values(columns);
  reader.read({.name = "values/w", .rows = 1, .cols = columns, .whole_rows = 1, .whole_cols = columns},
              std::as_writable_bytes(std::span(values)));
  REQUIRE(std::count(values.begin(), values.end(), values[0]) == columns);
  return values[0];
}

// The newest one of step 2, as a resume finds it.
float value_found(const std::string& folder) {
  const auto complete = complete_checkpoints(folder, [](const std::string&) {});
  REQUIRE(complete.size() == 2);
  CHECK(complete[1].manifest.state.step == 1);
  REQUIRE(complete[0].manifest.state.step == 2);
  return value_in(complete[0].path);
}

}  // namespace

TEST_CASE("a kill at any moment leaves the older or the newer checkpoint of a step", "[checkpoint]") {
  can_exchange = GENERATE(true, false);
  const int keep = GENERATE(0, 2);
  CAPTURE(can_exchange.load(), keep);
  const ScratchFolder scratch;
  const std::string folder = scratch.path("checkpoints");
  int older = 0, newer = 0, hidden = 0;
  for (int calls = 0;; ++calls) {
    CAPTURE(calls);
    fs::remove_all(folder);
    save(folder, 1, 10, 0);
    save(folder, 2, 20, 0);
    Child child([&] {
      calls_to_live = calls;
      save(folder, 2, 21, keep);
    });
    const int status = child.wait();
    if (WEXITSTATUS(status) != killed) {
      REQUIRE(status == 0);
      CHECK(names_in(folder) == Lines{"step-000001", "step-000002"});
      CHECK(value_in(folder + "/step-000002") == 21);
      break;
    }
    const float value = value_found(folder);
    CHECK((value == 20 || value == 21));
    ++(value == 20 ? older : newer);
    hidden += !fs::exists(folder + "/step-000002");
    // The run that goes on tidies up.
    save(folder, 3, 30, 0);
    CHECK(names_in(folder) == Lines{"step-000001", "step-000002", "step-000003"});
    CHECK(value_in(folder + "/step-000002") == value);
  }
  CHECK(older > 5);
  CHECK(newer > 1);
  CHECK((hidden > 0) == !can_exchange);
}

TEST_CASE("a folder that cannot take the other's name leaves that in its place", "[checkpoint]") {
  can_exchange = GENERATE(true, false);
  const ScratchFolder scratch;
  const auto put = [&](const std::string& name) {
    DurableFolder out(scratch.path("x"));
    write_durably(fs::path(out.partial()) / name, "");
    out.commit();
  };
  put("first");
  CHECK(refusal(
            scratch.path(),
            [&] {
              DurableFolder out(scratch.path("x"));
              fs::remove_all(out.partial());
              out.commit();
            },
            ExitCode::internal)
            .starts_with(".x.partial: cannot open: "));
  CHECK(names_in(scratch.path("x")) == Lines{"first"});
  put("second");
  CHECK(names_in(scratch.path("x")) == Lines{"second"});
  CHECK(names_in(scratch.path()) == Lines{"x"});
  can_exchange = true;
}

TEST_CASE("what a kill left of a replacement, and nothing else, gets its name back", "[checkpoint]") {
  const ScratchFolder scratch;
  for (const std::string name : {".a.replaced", ".b.replaced", "b", ".replaced", "..replaced", "c.replaced"})
    fs::create_directories(scratch.path("all/" + name));
  remove_leftovers(scratch.path("all"));
  CHECK(names_in(scratch.path("all")) == Lines{"..replaced", ".replaced", "a", "b", "c.replaced"});
  CHECK(name_before_replacement(".step-000001.replaced") == "step-000001");
}
