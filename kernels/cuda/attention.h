// Device::attention on a GPU: host code.
#pragma once

#include "core/device.h"
#include "kernels/cuda/cuda_memory.h"

namespace distill::cuda {

struct AttentionCall {
  ConstView q, k, v;
  const Segments& segments;
  const AttentionShape& shape;
};

// One instantiation per file attention_*.cu. delta: wide [tokens, q_heads] of memory for the time of the call.
template <class T>
void run_attention(const AttentionCall& call, View out, View log_sum, cudaStream_t stream);
template <class T>
void run_attention_backward(const AttentionCall& call, View dq, View dk, View dv, const ConstView& dout,
                            const ConstView& out, const ConstView& log_sum, void* delta, cudaStream_t stream);

}  // namespace distill::cuda
