// Checkpoints in a folder: step-000100/ with one HDF5 file a rank and a manifest with the checksum of every byte.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/communicator.h"
#include "core/device.h"
#include "core/train/checkpoint.h"
#include "io/checkpoint_manifest.h"
#include "io/checkpoint_reader.h"

namespace distill {

// This rank's coordinates in the grid.
struct StoredPlace {
  int tp = 0, pp = 0, dp = 0;
};

class CheckpointFolder final : public CheckpointStore {
 public:
  using Warn = std::function<void(const std::string&)>;  // called on the first rank only

  // `ranks`: all that own state. `keep` > 0: so many checkpoints stay; the oldest go once a new one has been read back.
  CheckpointFolder(std::string folder, CheckpointRun run, const StoredPlace& place, int keep, Device& device,
                   Communicator& ranks, Warn warn);

  void save(const TrainState& state, const std::vector<CheckpointTensor>& tensors) override;
  std::optional<std::string> newest() override;
  // Any checkpoint of this program, in this folder or elsewhere, written by any grid. Every byte is checked first.
  TrainState load(const std::string& path, const std::vector<CheckpointTensor>& tensors) override;

 private:
  // Nothing where this rank owns nothing.
  std::optional<StoredShard> write_shard(const std::string& folder, const std::vector<CheckpointTensor>& tensors) const;
  void check_every_byte(const std::string& path) const;
  void check_all_wanted(const CheckpointReader& reader, const std::vector<CheckpointTensor>& tensors) const;
  void prune(const std::string& newest_path) const;
  void warn(const std::string& message) const;

  std::string folder_;
  CheckpointRun run_;
  StoredPlace place_;
  int keep_;
  Device& device_;
  Communicator& ranks_;
  Warn warn_;
  std::int64_t serial_ = 0;  // of the newest checkpoint here; 0: not looked up yet. First rank only
};

}  // namespace distill
