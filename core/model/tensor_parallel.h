// Tensor and sequence parallelism as pairs of conjugate regions (Shoeybi et al. 2019; Korthikanti et al. 2022). Between
// blocks a rank holds the rows of the residual stream that are its own: all tokens, or with sequence parallelism an
// equal part of them. A branch enters its column-parallel product with all tokens and leaves its row-parallel product
// with a partial sum. The backward of entering is leaving and the other way round, so two operations are all there is:
//
//                         forward of entering, backward of leaving    forward of leaving, backward of entering
//   whole tokens          nothing                                     sum over the ranks
//   sequence parallel     gather tokens                               sum over the ranks, each its own tokens
#pragma once

#include "core/communicator.h"

namespace distill {

class TensorParallel {
 public:
  TensorParallel(Communicator& group, bool cuts_tokens)
      : group_(group), cuts_tokens_(cuts_tokens && group.size() > 1) {}

  int size() const { return group_.size(); }
  int rank() const { return group_.rank(); }
  Communicator& group() const { return group_; }
  bool cuts_tokens() const { return cuts_tokens_; }
  // Rows of the residual stream here, of `tokens`, which the group's size divides where tokens are cut.
  std::int64_t own_rows(std::int64_t tokens) const { return cuts_tokens_ ? tokens / size() : tokens; }
  // Those rows of a matrix with all tokens.
  View own(const View& whole) const {
    const std::int64_t n = own_rows(whole.rows);
    return cuts_tokens_ ? whole.row_slice(rank() * n, n) : whole;
  }

  // All tokens: `own` itself, or gathered into `whole`.
  View gather(View whole, View own) const {
    if (!cuts_tokens_) return own;
    group_.all_gather(whole, own);
    return whole;
  }
  // Sums `partial` [T, n] over the ranks; own [own_rows(T), n] is partial itself where tokens are not cut.
  void sum(View own, View partial) const {
    if (cuts_tokens_)
      group_.reduce_scatter(own, partial);
    else
      group_.all_reduce(partial);
  }

 private:
  Communicator& group_;
  bool cuts_tokens_;
};

}  // namespace distill
