// Checkpoints in a folder: step-000100/ with one HDF5 file a rank and a manifest with the checksum of every byte.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/communicator.h"
#include "core/device.h"
#include "core/train/checkpoint.h"
#include "io/checkpoint_manifest.h"
#include "io/checkpoint_reader.h"
#include "io/checkpoint_writer.h"

namespace distill {

class CheckpointFolder final : public CheckpointStore {
 public:
  using Warn = CheckpointWriter::Warn;

  // `ranks`: all that own state, and all make the store together. `keep` > 0: so many checkpoints stay; the oldest go
  // once a new one is complete.
  CheckpointFolder(
      std::string folder, CheckpointRun run, const StoredPlace& place, int keep, Device& device, Communicator& ranks,
      Warn warn, CheckpointWriter::BeforeCommit before_commit = [] {});

  // Takes the host memory that a save of these tensors needs; too little of it is an OutOfMemory.
  void reserve(const std::vector<CheckpointTensor>& tensors);
  void save(const TrainState& state, const std::vector<CheckpointTensor>& tensors) override;
  void finish() override { writer_.finish(); }
  std::optional<std::string> newest() override;
  // Any checkpoint of this program, in this folder or elsewhere, written by any grid. Every byte is checked first,
  // unless newest() has just done it.
  TrainState load(const std::string& path, const std::vector<CheckpointTensor>& tensors) override;

 private:
  void check_every_byte(const std::string& path) const;
  void check_all_wanted(const CheckpointReader& reader, const std::vector<CheckpointTensor>& tensors) const;
  void warn(const std::string& message) const;

  std::string folder_;
  CheckpointRun run_;
  std::string verified_;  // what newest() has checked, for load() to go on with
  std::string nearest_;   // this rank's own file, where the same grid wrote it
  Device& device_;
  Communicator& ranks_;
  Warn warn_;
  CheckpointWriter writer_;
};

}  // namespace distill
