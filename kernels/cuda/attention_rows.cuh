// What both attention kernels take, and which rows see which: tiles run over tokens without regard to sequences, and
// each query row knows the first key that it may see.
#pragma once

#include "kernels/cuda/language.h"  // before what includes the toolkit's headers

#include "kernels/cuda/attention.h"
#include "kernels/cuda/memory.cuh"
#include "kernels/cuda/team.cuh"

namespace distill::cuda {

template <class T>
struct AttentionArguments {
  using C = Compute<T>;
  Rows<const T> q, k, v, out, dout;
  Rows<const C> log_sum;
  Rows<T> to_out, dq, dk, dv;
  Rows<C> to_log_sum;
  C* delta;  // [tokens, q_heads]: Σ dout · out
  const std::int32_t* offsets;
  int segments, tokens, group, head_dim, q_heads, window;
  C scale;
};

// The sequence of a token: the last one that begins at or before it. Empty ones have no tokens.
struct Span {
  int first, end;
};
template <class T>
__device__ Span sequence_of(const AttentionArguments<T>& a, int token) {
  int low = 0, high = a.segments;  // offsets[low] ≤ token < offsets[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (a.offsets[middle] <= token ? low : high) = middle;
  }
  return {a.offsets[low], a.offsets[high]};
}
// Query t sees the keys [first_key(t), t]; key j is seen by the queries [j, last_query(j)].
template <class T>
__device__ int first_key(const AttentionArguments<T>& a, int t) {
  const int first = sequence_of(a, t).first;
  return a.window > 0 && t - a.window + 1 > first ? t - a.window + 1 : first;
}
template <class T>
__device__ int last_query(const AttentionArguments<T>& a, int j) {
  const int end = sequence_of(a, j).end;
  return a.window > 0 && j + a.window < end ? j + a.window - 1 : end - 1;
}

template <class T>
__device__ Compute<T> delta_of(const AttentionArguments<T>& a, int t, int head) {
  return a.delta[std::int64_t(t) * a.q_heads + head];
}

}  // namespace distill::cuda
