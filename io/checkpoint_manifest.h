// manifest.json of a checkpoint: written last, so a folder that has a good one is complete. Says what every file must
// contain, byte for byte.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/train/train_state.h"
#include "io/hdf5.h"

namespace distill {

struct StoredGrid {
  int tp = 1, pp = 1, dp = 1;
  bool operator==(const StoredGrid&) const = default;
};
std::string describe(const StoredGrid& grid);  // "tp 1, pp 1, dp 2"

// What tells training data apart: the encoded records, in the order of their files.
struct StoredData {
  std::int64_t records = 0, tokens = 0;
  std::string hash;  // hash.h
  bool operator==(const StoredData&) const = default;
};

// What holds for every checkpoint of a run.
struct CheckpointRun {
  std::string version;                // of this program
  std::string config;                 // resolved, as YAML
  std::uint64_t seed = 0;             // of the data's order
  int threads = 1;                    // compute threads of a student rank, on which sums depend; 0: not known
  std::int64_t samples_per_step = 0;  // the global batch
  StoredGrid grid;
  std::optional<StoredData> data = {};  // none: not known, as in manifests of older versions
};

struct StoredDataset {
  std::string tensor;   // "values/model.norm.weight"
  StoredMatrix matrix;  // this part of it; matrix.name: of the dataset, as a file may hold several parts
  FileRange range;
  std::uint32_t crc = 0;
};

struct StoredShard {
  std::string file;  // in the checkpoint's folder
  std::uint64_t bytes = 0;
  std::uint32_t frame_crc = 0;  // of all bytes that belong to no dataset
  std::vector<StoredDataset> datasets;
};

struct CheckpointManifest {
  std::int64_t serial = 0;  // counts the checkpoints of a folder in the order in which they were written
  std::string written;      // when, in UTC: "2026-01-31T12:00:00Z"
  TrainState state;
  CheckpointRun run;
  std::vector<StoredShard> shards;
};

std::string to_json(const CheckpointManifest& manifest);
// From <folder>/manifest.json; what is wrong with it is an input error.
CheckpointManifest read_manifest(const std::string& folder);

// Whether a run may go on from a checkpoint: an input error where it may not, else what will be different, one line
// each.
std::vector<std::string> check_continues(const std::string& path, const CheckpointManifest& manifest,
                                         const CheckpointRun& run);

// A folder with the name of a checkpoint, and its manifest or what is wrong with that or with the sizes of the files.
struct FoundCheckpoint {
  std::string path;
  std::int64_t step = 0;  // by its name
  std::optional<CheckpointManifest> manifest;
  std::string problem;
};
// Those of a folder, by step. One that a kill left while it was being replaced (durable_file.h) counts where its
// successor has not come to the name.
std::vector<FoundCheckpoint> find_checkpoints(const std::string& folder);

// A checkpoint whose manifest and file sizes are right.
struct CompleteCheckpoint {
  std::string path;
  CheckpointManifest manifest;
};
// Those of a folder, newest first. Later ones that are not complete are reported, the last one first.
std::vector<CompleteCheckpoint> complete_checkpoints(const std::string& folder,
                                                     const std::function<void(const std::string&)>& report);

// The one with the lowest validation loss, of equal ones the newest; null where none was validated.
const CompleteCheckpoint* best_of(const std::vector<CompleteCheckpoint>& complete);
// The name in a folder of checkpoints that stands for the best one: a link.
inline constexpr const char* best_name = "best";

// One shard, on its own: how ranks tell rank 0 what they wrote.
std::string to_json(const StoredShard& shard);
StoredShard parse_shard(const std::string& json);

// Checksum of the bytes of a file outside its datasets. Fails where these do not lie side by side within the file.
std::uint32_t frame_checksum(const std::string& path, const StoredShard& shard);
// Checks every byte.
void check_shard(const std::string& folder, const StoredShard& shard);

}  // namespace distill
