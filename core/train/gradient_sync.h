// What data parallel ranks do with their gradients before the optimiser sees them.
#pragma once

#include "core/communicator.h"

namespace distill {

class GradientSync {
 public:
  virtual ~GradientSync() = default;
  // gradients: the flat storage of this rank, [1, n] wide. Afterwards it holds the sum over all ranks, the same bits on
  // each. The loss is already divided by the global count, so a sum is what is wanted.
  virtual void reduce(View gradients) = 0;
};

// The sum in one piece, when backward is done.
class AllReduceSync final : public GradientSync {
 public:
  explicit AllReduceSync(Communicator& dp) : dp_(dp) {}
  void reduce(View gradients) override { dp_.all_reduce(gradients); }

 private:
  Communicator& dp_;
};

}  // namespace distill
