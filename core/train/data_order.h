// Which samples make up which step: pure functions of seed and step number, the same on every rank and for every grid,
// so a resumed run needs one integer.
#pragma once

#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

namespace distill {

// The order of an epoch: 0 … samples − 1 unless it shuffles; else Fisher–Yates from the top,
//   for i = samples − 1 … 1: swap(order[i], order[r(i) mod (i + 1)]),
//   r(i) = S(key + i · 0x9e3779b97f4a7c15),  key = S(S(seed) + epoch),
// with S the output function of SplitMix64 (Steele, Lea & Flood 2014): x += 0x9e3779b97f4a7c15, then its two
// xor-shift-multiply rounds and the last xor-shift. Integer arithmetic only: the same everywhere.
std::vector<std::int32_t> epoch_order(std::int64_t samples, std::uint64_t seed, std::int64_t epoch, bool shuffle);

// How the sequences of a step are dealt out. Block m · dp_size + r of per_device sequences is micro-batch m of dp rank
// r, so grids with the same accumulation · dp_size have the same micro-batches.
struct BatchShape {
  int per_device = 1, accumulation = 1, dp_size = 1;

  std::int64_t global() const { return std::int64_t(per_device) * accumulation * dp_size; }
  // The part of a step's samples (all of them, or fewer in a last batch that is kept) that is micro-batch m of a dp
  // rank.
  std::span<const std::int32_t> cut(std::span<const std::int32_t> step_samples, int m, int dp_rank) const;
};

enum class LastBatch {
  drop,  // an epoch ends before its incomplete batch (training)
  keep   // every sample exactly once an epoch (validation)
};

class DataOrder {
 public:
  DataOrder(std::int64_t samples, std::int64_t global_batch, LastBatch last, std::uint64_t seed, bool shuffle);

  std::int64_t steps_per_epoch() const { return steps_per_epoch_; }
  // Samples of step 0, 1, …: epoch = step / steps_per_epoch().
  std::vector<std::int32_t> step_samples(std::int64_t step) const;

 private:
  std::int64_t samples_, global_batch_, steps_per_epoch_;
  std::uint64_t seed_;
  bool shuffle_;
  // The order of the epoch asked for last: it takes a pass over all samples to make.
  mutable std::mutex mutex_;
  mutable std::int64_t epoch_ = -1;
  mutable std::vector<std::int32_t> order_;
};

}  // namespace distill
