// Writes checkpoints on a thread of its own while training goes on: a rank's file, its verification, and with the other
// ranks what makes the checkpoint complete.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/communicator.h"
#include "core/lane.h"
#include "io/checkpoint_manifest.h"

namespace distill {

// This rank's coordinates in the grid.
struct StoredPlace {
  int tp = 0, pp = 0, dp = 0;
};
// Its file in a checkpoint.
std::string shard_name(const StoredPlace& place);

class CheckpointWriter {
 public:
  // Called on the first rank only, on whichever thread.
  using Warn = std::function<void(const std::string&)>;
  // Called on the first rank only, on the writer's thread, before a checkpoint gets its name: makes durable what must
  // not be behind it.
  using BeforeCommit = std::function<void()>;

  // `ranks`: all that own state; the writer talks to them in a group of its own. `keep` > 0: so many of the newest
  // checkpoints stay, and the best one; the others go once a new one has been read back. So does an older checkpoint of
  // the same step, whatever `keep` is.
  CheckpointWriter(
      std::string folder, CheckpointRun run, const StoredPlace& place, int keep, Communicator& ranks, Warn warn,
      BeforeCommit before_commit = [] {});
  // Waits until all is written. While an exception passes it leaves off instead: that checkpoint will not exist.
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  // Copies the values of one part.
  using Copy = std::function<void(std::size_t part, std::span<std::byte> to)>;
  // Takes the memory that a save of these parts copies to, so that where there is too little of it a run ends before it
  // begins (OutOfMemory). Without it the first save does so.
  void reserve(const std::vector<StoredMatrix>& parts);
  // Waits for the checkpoint before, copies this one and begins to write it. Parts without elements are left out. A
  // failure to write is a warning and leaves older checkpoints as they are. Throws where a rank was lost.
  void save(const TrainState& state, const std::vector<StoredMatrix>& parts, const Copy& copy);
  // Waits for the last one and throws where it failed.
  void finish();

 private:
  struct Part {
    std::string tensor;
    StoredMatrix matrix;
    std::span<const std::byte> values;
  };

  void take(const std::vector<StoredMatrix>& parts, const Copy& copy);
  void wait();
  // All that follows runs on the writer's thread.
  void write();
  void write_checkpoint();
  std::string begin(std::optional<class DurableFolder>& out);
  std::optional<StoredShard> write_shard(const std::string& folder) const;
  void put_manifest(const std::string& folder, const std::vector<std::string>& shards);
  void tidy() const;
  bool mark(const CompleteCheckpoint& best) const;
  void prune(const std::vector<CompleteCheckpoint>& complete) const;
  bool is_first() const { return ranks_->rank() == 0; }

  std::string folder_;
  CheckpointRun run_;
  StoredPlace place_;
  int keep_;
  std::unique_ptr<Communicator> ranks_;
  Warn warn_;
  BeforeCommit before_commit_;
  int exceptions_at_start_;
  std::atomic<bool> is_abandoned_ = false;

  // What is being written: the writer's thread has it until wait() returns.
  TrainState state_;
  std::vector<Part> parts_;
  std::unique_ptr<std::byte[]> memory_;  // of all values; kept from one checkpoint to the next
  std::size_t memory_bytes_ = 0;
  std::exception_ptr failure_;
  bool has_lost_rank_ = false;
  std::int64_t serial_ = 0;  // of the newest checkpoint here; 0: not looked up yet. First rank only

  Lane lane_;
  std::unique_ptr<Pending> writing_;
};

}  // namespace distill
