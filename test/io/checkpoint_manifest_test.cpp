// What can be said of a checkpoint without a device: files that lack bytes, and whether a run may go on from it.
#include "io/checkpoint_manifest.h"

#include <algorithm>
#include <catch2/catch.hpp>

#include "test/support/refusal.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using namespace distill::test;

TEST_CASE("a shard that is missing or too short is named", "[checkpoint]") {
  const ScratchFolder folder;
  StoredShard shard;
  shard.file = "student.h5";
  shard.bytes = 100;
  CHECK(refusal(folder.path(), [&] { check_shard(folder.path(), shard); }) ==
        "student.h5: cannot open: No such file or directory");
  const std::string path = folder.write("student.h5", "0123456789");
  CHECK(refusal(folder.path(), [&] { check_shard(folder.path(), shard); }) ==
        "student.h5: has 10 bytes, its manifest says 100");
  CHECK(refusal(folder.path(), [&] { frame_checksum(path, shard); }) == "student.h5: cannot read: it ends too early");
}

TEST_CASE("a run may go on where grid and global batch are the same; what else differs is told", "[checkpoint]") {
  CheckpointManifest manifest;
  manifest.run.seed = 42;
  manifest.run.threads = 2;
  manifest.run.samples_per_step = 8;
  CheckpointRun run = manifest.run;
  using Lines = std::vector<std::string>;
  CHECK(check_continues("step-000002", manifest, run) == Lines{});
  run.seed = 7;
  run.threads = 3;
  CHECK(check_continues("step-000002", manifest, run) ==
        Lines{"step-000002: was written with seed 42, this run has 7: the data comes in another order",
              "step-000002: was written with 2 compute threads a rank, this run has 3: the run goes on, but not with "
              "the same bits"});
  const StoredData data{.records = 60, .tokens = 900, .hash = "ab"};
  run.data = data;  // an older manifest knows nothing of it
  CHECK(check_continues("step-000002", manifest, run).size() == 2);
  manifest.run.data = data;
  CHECK(check_continues("step-000002", manifest, run).size() == 2);
  for (const StoredData& other : {StoredData{61, 900, "ab"}, StoredData{60, 901, "ab"}, StoredData{60, 900, "cd"}}) {
    run.data = other;
    CHECK(check_continues("step-000002", manifest, run).at(1) ==
          text("step-000002: was written with other training data (60 records of 900 tokens, hash ab; this run: ",
               other.records, " records of ", other.tokens, " tokens, hash ", other.hash,
               "): from here on the order of the data is not the interrupted run's"));
  }
  run.data.reset();  // not known
  run.threads = 0;   // not known
  CHECK(check_continues("step-000002", manifest, run).size() == 1);
  run.samples_per_step = 6;
  CHECK(refusal("", [&] {
          check_continues("step-000002", manifest, run);
        }).starts_with("step-000002: was written with a global batch of 8 sequences, this run has 6 ("));
  run.samples_per_step = 8;
  run.grid.tp = 2;
  const Lines differences = check_continues("step-000002", manifest, run);
  CHECK(std::count_if(differences.begin(), differences.end(), [](const std::string& line) {
          return line.find("was written by another grid (tp 1, pp 1, dp 1; this run: tp 2, pp 1, dp 1)") !=
                 std::string::npos;
        }) == 1);
}
