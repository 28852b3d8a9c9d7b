// Writing checkpoints in the background: what is saved is what was there when save() was called, whatever goes on
// meanwhile, and a rank or a disk that fails takes no more with it than the checkpoint being written.
#include "io/checkpoint_writer.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <thread>

#include "io/checkpoint_reader.h"
#include "io/hdf5_sink.h"
#include "parallel/parallel.h"
#include "test/support/limit.h"
#include "test/support/refusal.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using namespace distill::test;
namespace fs = std::filesystem;
using Lines = std::vector<std::string>;

namespace {
std::atomic<bool> disk_forgets = false;
}

// A disk that says it has written and has not: the last byte of a large write is another.
extern "C" ssize_t pwrite(int file, const void* bytes, std::size_t count, off_t at) {
  std::vector<std::byte> changed(static_cast<const std::byte*>(bytes), static_cast<const std::byte*>(bytes) + count);
  if (disk_forgets && count > 1000) changed.back() ^= std::byte(1);
  return syscall(SYS_pwrite64, file, changed.data(), count, at);
}

namespace {

Lines names_in(const fs::path& folder) {
  Lines names;
  if (fs::exists(folder))
    for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

void wait_for(const std::atomic<bool>& flag) {
  while (!flag) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

constexpr std::int64_t columns = 1000;

// A rank that owns rows of one matrix.
struct Rank {
  Rank(const ScratchFolder& scratch, Communicator& world, std::int64_t rows = 3, int keep = 0)
      : folder(scratch.path("checkpoints")), me(world.rank()), values(std::size_t(rows * columns)) {
    CheckpointRun run;
    run.grid.dp = world.size();
    writer = std::make_unique<CheckpointWriter>(folder, run, StoredPlace{.dp = me}, keep, world,
                                                [this](const std::string& message) {
                                                  const std::lock_guard lock(mutex);
                                                  warnings.push_back(without(message, folder));
                                                });
  }
  void save(std::int64_t step) {
    std::fill(values.begin(), values.end(), float(10 * step + me));
    const std::int64_t rows = std::int64_t(values.size()) / columns;
    const StoredMatrix part{.name = "values/w",
                            .rows = rows,
                            .cols = columns,
                            .whole_rows = 1000,
                            .whole_cols = columns,
                            .first_row = me * rows};
    writer->save({.step = step}, {part},
                 [&](std::size_t, std::span<std::byte> to) { std::memcpy(to.data(), values.data(), to.size()); });
    std::fill(values.begin(), values.end(), -1.f);  // training goes on
  }
  // The values that a checkpoint has of rank r; nothing where they are not all the same.
  float value(const std::string& name, int r) const {
    CheckpointReader reader(folder + '/' + name, read_manifest(folder + '/' + name));
    for (const StoredShard& shard : reader.manifest().shards) check_shard(reader.path(), shard);
    StoredMatrix wanted = reader.manifest().shards.at(std::size_t(r)).datasets.front().matrix;
    wanted.name = "values/w";
    std::vector<float> found(std::size_t(wanted.rows * wanted.cols));
    reader.read(wanted, std::as_writable_bytes(std::span(found)));
    return std::count(found.begin(), found.end(), found[0]) == std::ptrdiff_t(found.size()) ? found[0] : -2.f;
  }
  Lines warned() {
    const std::lock_guard lock(mutex);
    return warnings;
  }

  std::string folder;
  int me;
  std::vector<float> values;
  std::mutex mutex;
  Lines warnings;
  std::unique_ptr<CheckpointWriter> writer;
};

}  // namespace

TEST_CASE("a save returns before the others have come, the next one waits for it", "[writer]") {
  const ScratchFolder scratch;
  std::atomic<bool> first_returned = false, first_is_there = false;
  run_ranks(2, [&](Communicator& world) {
    Rank rank(scratch, world);
    if (rank.me == 1) wait_for(first_returned);
    rank.save(1);
    first_returned = true;
    rank.save(2);
    if (rank.me == 0)
      first_is_there = names_in(rank.folder)[0] == "step-000001" || names_in(rank.folder)[1] == "step-000001";
    rank.writer->finish();
    for (const int r : {0, 1}) {
      check(rank.value("step-000001", r) == float(10 + r), "step 1 of rank ", r);
      check(rank.value("step-000002", r) == float(20 + r), "step 2 of rank ", r);
    }
  });
  CHECK(first_is_there);
  CHECK(names_in(scratch.path("checkpoints")) == Lines{"step-000001", "step-000002"});
}

TEST_CASE("metrics are written while checkpoints are", "[writer]") {
  const ScratchFolder scratch;
  constexpr std::int64_t steps = 60;
  run_ranks(2, [&](Communicator& world) {
    Rank rank(scratch, world, 100, 2);
    std::optional<Hdf5Sink> sink;
    if (rank.me == 0)
      sink.emplace(scratch.path("metrics.h5"), std::vector<MetricSeries>{{"train/loss", {}}},
                   [](const std::string&) {});
    for (std::int64_t step = 1; step <= steps; ++step) {
      if (sink) sink->write({.step = step, .wall_time = 1, .values = {{"train/loss", double(step)}}});
      if (step % 4 == 0) rank.save(step);
    }
    rank.writer->finish();
    check(rank.value("step-000060", 1) == 601, "the last checkpoint");
  });
  CHECK(names_in(scratch.path("checkpoints")) == Lines{"step-000056", "step-000060"});
  const std::vector<MetricSeries> series = read_hdf5_metrics(scratch.path("metrics.h5"));
  REQUIRE(series.at(0).points.size() == steps);
  for (std::int64_t i = 0; i < steps; ++i) CHECK(series[0].points[std::size_t(i)].value == double(i + 1));
}

TEST_CASE("where one rank cannot write, all know, once, and the run goes on", "[writer]") {
  const ScratchFolder scratch;
  std::array<std::string, 2> messages;
  Lines warnings;
  run_ranks(2, [&](Communicator& world) {
    Rank rank(scratch, world, world.rank() == 1 ? 500 : 3, 1);
    rank.save(1);
    rank.writer->finish();
    world.barrier();
    {
      std::optional<FileLimit> full;  // of this process: only the file of rank 1 is so large
      if (rank.me == 0) full.emplace(1'000'000);
      world.barrier();
      rank.save(2);
      rank.save(3);  // says nothing of it
      const Error error = error_of([&] { rank.writer->finish(); });
      check(error.code() == ExitCode::internal, "code ", int(error.code()));
      messages[std::size_t(rank.me)] = without(error.what(), scratch.path());
      world.barrier();
    }
    check(names_in(rank.folder) == Lines{"step-000001"}, "something else is there");
    world.barrier();
    rank.save(4);
    rank.writer->finish();
    if (rank.me == 0) warnings = rank.warned();
    check(rank.me == 0 || rank.warned().empty(), "rank 1 warned too");
  });
  for (const std::string& message : messages) {
    CHECK(message.starts_with("checkpoints/.step-000003.partial/student-pp0-tp0-dp1.h5: cannot write "));
    CHECK(message.ends_with("File too large"));
  }
  REQUIRE(warnings.size() == 2);
  CHECK(warnings[0].starts_with(
      "the checkpoint of step 2 could not be written: /.step-000002.partial/student-pp0-tp0-dp1"));
  CHECK(names_in(scratch.path("checkpoints")) == Lines{"step-000004"});
}

TEST_CASE("what the disk has not kept is removed, and the one before stays", "[writer]") {
  const ScratchFolder scratch;
  Alone alone;
  Rank rank(scratch, alone, 3, 1);
  rank.save(1);
  rank.writer->finish();
  disk_forgets = true;
  rank.save(2);
  CHECK(refusal(scratch.path(), [&] { rank.writer->finish(); }) ==
        "checkpoints/.step-000002.partial/student-pp0-tp0-dp0.h5: values/w is damaged (its checksum does not match)");
  disk_forgets = false;
  CHECK(rank.warned().size() == 1);
  CHECK(names_in(rank.folder) == Lines{"step-000001"});
  rank.save(2);
  rank.writer->finish();
  CHECK(names_in(rank.folder) == Lines{"step-000002"});
  CHECK(rank.value("step-000002", 0) == 20);
}

TEST_CASE("what must not be behind a checkpoint is called for before that has its name, on the first rank",
          "[writer]") {
  const ScratchFolder scratch;
  const std::string folder = scratch.path("checkpoints");
  std::vector<Lines> seen;
  run_ranks(2, [&](Communicator& world) {
    const StoredMatrix part{
        .name = "values/w", .rows = 1, .cols = 1, .whole_rows = 2, .whole_cols = 1, .first_row = world.rank()};
    CheckpointWriter writer(
        folder, {}, {.dp = world.rank()}, 0, world, [](const std::string&) {},
        [&] {
          seen.push_back(names_in(folder));
          if (seen.size() == 2) fail("out of luck");
        });
    const auto save = [&](std::int64_t step) {
      writer.save({.step = step}, {part}, [](std::size_t, std::span<std::byte>) {});
      writer.finish();
    };
    save(1);
    const Error error = error_of([&] { save(2); });
    check(std::string(error.what()) == "out of luck", error.what());
  });
  CHECK(seen == std::vector<Lines>{{".step-000001.partial"}, {".step-000002.partial", "step-000001"}});
  CHECK(names_in(folder) == Lines{"step-000001"});
}

TEST_CASE("an older checkpoint of the same step goes once the new one has been read back", "[writer]") {
  const ScratchFolder scratch;
  std::atomic<int> refused = 0;
  run_ranks(2, [&](Communicator& world) {
    Rank rank(scratch, world);  // which keeps all and so reads none back
    rank.save(1);
    rank.save(2);
    rank.writer->finish();
    const auto serial = [&] { return read_manifest(rank.folder + "/step-000002").serial; };
    check(serial() == 2, "the older one");
    world.barrier();
    disk_forgets = true;
    world.barrier();
    rank.save(2);
    refused += error_of([&] { rank.writer->finish(); }).code() == ExitCode::bad_input;
    world.barrier();
    disk_forgets = false;
    check(names_in(rank.folder) == Lines{"step-000001", "step-000002"}, "something else is there");
    check(serial() == 2 && rank.value("step-000002", 0) == 20 && rank.value("step-000002", 1) == 21, "it is gone");
    world.barrier();
    rank.save(2);
    rank.writer->finish();
    check(serial() > 2 && rank.value("step-000002", 1) == 21, "the newer one");
  });
  CHECK(refused == 2);
}

TEST_CASE("a rank that fails is not waited for, and does not wait", "[writer]") {
  const ScratchFolder scratch;
  const bool is_first = GENERATE(true, false);
  std::atomic<bool> is_gone = false;
  std::string other;
  const Error error = error_of([&] {
    run_ranks(2, [&](Communicator& world) {
      if ((world.rank() == 0) == is_first) {
        try {
          Rank rank(scratch, world);
          rank.save(1);  // which the other rank has not begun
          fail("out of luck");
        } catch (const Error&) {
          is_gone = true;
          throw;
        }
      }
      Rank rank(scratch, world);
      wait_for(is_gone);
      rank.save(1);
      const Error lost = error_of([&] { rank.writer->finish(); });
      check(lost.code() == ExitCode::peer_lost, "code ", int(lost.code()));
      other = lost.what();
      check(rank.warned().empty(), "a warning, too");
    });
  });
  CHECK(std::string(error.what()) == "out of luck");
  CHECK_THAT(other, Catch::Contains("checkpoint writers"));
  CHECK(names_in(scratch.path("checkpoints")).empty());
}
