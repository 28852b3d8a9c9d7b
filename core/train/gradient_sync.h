// What the ranks of a grid do with their gradients before the optimiser sees them, and with the parameters after. The
// loss is already divided by the global count, so a sum is what is wanted everywhere.
#pragma once

#include <memory>
#include <vector>

#include "core/communicator.h"
#include "core/model/params.h"

namespace distill {

class GradientSync {
 public:
  // Groups that this rank takes part in.
  struct Groups {
    Communicator& dp;
    Communicator& tp;
    Communicator* kv = nullptr;    // tensor-parallel ranks that share key/value heads
    Communicator* tied = nullptr;  // first and last pipeline stage where they hold the same embedding
  };
  // Storages are flat [1, n]. shards: every data-parallel rank gets the sums of its part of each bucket
  // (reduce-scatter) and hands out the parameters it updated; otherwise each gets all sums. overlaps: a bucket's sum
  // runs while the backward goes on.
  GradientSync(const ParamTable& table, View values, View gradients, const Groups& groups, bool shards, bool overlaps);

  // What this rank's optimiser updates.
  std::vector<Range> owned() const;

  // No more is added to this bucket of gradients in this step.
  void bucket_ready(std::size_t bucket);
  // All buckets are ready. Afterwards the owned ranges hold the sums over the grid, the same bits on every rank.
  void finish();
  // After the update: every rank gets the parameters that the others own.
  void share_values();

 private:
  Range part_of(const Range& bucket) const;
  View in(const View& flat, const Range& range) const { return flat.col_slice(range.begin, range.size); }
  void sum_partial_gradients(const Range& bucket);
  std::unique_ptr<Pending> start(const Range& bucket);

  const ParamTable& table_;
  View values_, gradients_;
  Groups groups_;
  bool shards_, overlaps_;
  std::vector<bool> is_ready_;
  std::vector<std::unique_ptr<Pending>> pending_;
};

}  // namespace distill
