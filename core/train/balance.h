// Which sequences of a step go to which micro-batch of which data-parallel rank, so that no rank waits long for
// another. Only who computes a sequence changes: the step's set of sequences, and with it the loss and its gradient, is
// the same.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/train/data_order.h"

namespace distill {

// What a sequence costs, in units of one (token, token) pair of attention: products with weights grow with its length,
// attention with its square.
struct SequenceWork {
  std::int64_t per_token = 0;

  std::int64_t operator()(std::int64_t length) const { return length * (per_token + length); }
};

// The samples of a step in an order that `shape` cuts into micro-batches of the same sizes as before, with work even
// over dp ranks and, within a rank, over its micro-batches. The largest work of a rank is never more than it was.
// work[i] is that of samples[i]. Integer arithmetic only: the same on every rank.
std::vector<std::int32_t> balanced_order(std::span<const std::int32_t> samples, std::span<const std::int64_t> work,
                                         const BatchShape& shape);

}  // namespace distill
