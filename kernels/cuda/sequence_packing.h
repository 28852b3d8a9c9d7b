// The sequences of a micro-batch in the form in which cuDNN takes them.
#pragma once

#include <array>
#include <cstdint>

#include "core/device.h"
#include "kernels/cuda/cuda_memory.h"

namespace distill::cuda {

struct PackedSequences {
  static constexpr int most_operands = 9;
  std::int64_t sequences = 0;  // at least those of the segments; the others are empty
  int operands = 0;
  std::array<std::int64_t, most_operands> strides{};  // of each operand's rows, in elements
  std::int32_t* lengths = nullptr;                    // [sequences]
  std::int64_t* offsets =
      nullptr;  // [operands, sequences + 1]: where each sequence begins in each operand, in elements
};

void pack_sequences(const PackedSequences& to, const Segments& from, cudaStream_t stream);

}  // namespace distill::cuda
