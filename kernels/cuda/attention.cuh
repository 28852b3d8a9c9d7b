// Which kernel takes a call, for each number type.
#pragma once

#include "kernels/cuda/language.h"  // before what includes the toolkit's headers

#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_plain.cuh"

namespace distill::cuda {

template <class T>
AttentionArguments<T> arguments_of(const AttentionCall& call) {
  using C = Compute<T>;
  AttentionArguments<T> a{};
  a.q = rows_of<T>(call.q), a.k = rows_of<T>(call.k), a.v = rows_of<T>(call.v);
  a.offsets = call.segments.offsets.as<std::int32_t>();
  a.segments = int(call.segments.count());
  check(call.q.rows <= std::numeric_limits<int>::max(), "attention of ", call.q.rows, " tokens");
  a.tokens = int(call.q.rows);
  a.group = call.shape.q_heads / call.shape.kv_heads;
  a.head_dim = call.shape.head_dim;
  a.q_heads = call.shape.q_heads;
  a.window = call.shape.window;
  a.scale = C(call.shape.scale);
  return a;
}

template <class T>
void run_attention(const AttentionCall& call, View out, View log_sum, cudaStream_t stream) {
  AttentionArguments<T> a = arguments_of<T>(call);
  a.to_out = rows_of<T>(out), a.to_log_sum = rows_of<Compute<T>>(log_sum);
  if constexpr (sizeof(T) == 2)
    if (suits_mma(a.head_dim, a.q, a.k, a.v, a.to_out)) return run_attention_mma(a, stream);
  run_attention_plain(a, stream);
}

template <class T>
void run_attention_backward(const AttentionCall& call, View dq, View dk, View dv, const ConstView& dout,
                            const ConstView& out, const ConstView& log_sum, void* delta, cudaStream_t stream) {
  using C = Compute<T>;
  AttentionArguments<T> a = arguments_of<T>(call);
  a.dq = rows_of<T>(dq), a.dk = rows_of<T>(dk), a.dv = rows_of<T>(dv);
  a.out = rows_of<T>(out), a.dout = rows_of<T>(dout), a.log_sum = rows_of<C>(log_sum);
  a.delta = static_cast<C*>(delta);
  constexpr int delta_warps = 8;
  launch(attention_delta_kernel<T>,
         Grid(as_blocks(blocks_for(std::int64_t(a.tokens) * a.q_heads, delta_warps)), delta_warps * Warp::size), stream,
         a);
  if constexpr (sizeof(T) == 2)
    if (suits_mma(a.head_dim, a.q, a.k, a.v, a.dout, a.dq, a.dk, a.dv)) return run_attention_mma_backward(a, stream);
  run_attention_plain_backward(a, stream);
}

}  // namespace distill::cuda
