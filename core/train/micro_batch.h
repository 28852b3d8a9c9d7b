// What one forward and backward processes, on the host: a few sequences, packed or padded, and which positions are
// supervised.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/train/samples.h"

namespace distill {

// Rows are tokens; T of them in S sequences, C supervised.
struct MicroBatch {
  std::vector<std::int32_t> tokens, positions;   // [T]; positions restart at 0 in each sequence
  std::vector<std::int32_t> offsets{0};          // [S + 1]: sequence s occupies rows [offsets[s], offsets[s + 1])
  std::vector<std::int32_t> supervised, labels;  // [C]: rows whose next token is labelled, and that next token
  std::int32_t longest = 0;                      // rows of the longest sequence, padding included
  std::int64_t real_tokens = 0;                  // without padding
};

enum class Layout {
  packed,  // sequences follow each other, T = sum of their lengths
  padded   // each is filled up at its end to the longest: T = S · longest. Attention is causal, so no token sees the
           // filling, and the filling is never supervised
};

// The micro-batch of these samples, in this order. Rows are filled up to a multiple of `row_multiple` (sequence
// parallelism cuts them evenly) by a last sequence that nothing reads and nothing supervises.
MicroBatch assemble(const Samples& samples, std::span<const std::int32_t> indices, Layout layout, int row_multiple = 1);

}  // namespace distill
