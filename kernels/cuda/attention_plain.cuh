// Attention of any number type with heads of up to 256 columns: a warp works on one row at a time against tiles of 32
// rows of the other side. Nothing of tokens × tokens is kept. What tensor cores cannot take, and all of f32 and f64.
#pragma once

#include "kernels/cuda/language.h"  // before what includes the toolkit's headers

#include "kernels/cuda/attention_rows.cuh"

namespace distill::cuda {

constexpr int tile = Warp::size;

// Threads of a block, rows that each warp owns, and columns of a head that a lane owns, so that tiles of the widest
// head fit into shared memory.
template <class T>
struct AttentionPlan {
  static constexpr int warps = 4, rows_each = sizeof(T) == 8 ? 1 : 4, owned = warps * rows_each;
  static constexpr int threads = warps * Warp::size;
};

// One row of columns more than a head has: lanes that read the same column of different rows meet different banks.
DISTILL_HD inline int padded(int head_dim) { return head_dim + 1; }

template <class C>
inline constexpr C lowest = std::numeric_limits<C>::lowest();

// Rows [first, first + count) of a head into shared memory; rows beyond `end` are zeros.
template <class T>
__device__ void load_rows(T* to, const Rows<const T>& from, int first, int count, int end, int head, int head_dim) {
  for (int i = int(threadIdx.x); i < count * head_dim; i += int(blockDim.x)) {
    const int r = i / head_dim, c = i % head_dim;
    to[r * padded(head_dim) + c] = first + r < end ? from[first + r][head * head_dim + c] : T(Compute<T>(0));
  }
}

template <class T>
__device__ Compute<T> dot(const T* a, const T* b, int n) {
  using C = Compute<T>;
  C sum = 0;
  for (int c = 0; c < n; ++c) sum += C(a[c]) * C(b[c]);
  return sum;
}

// A row of a head spread over the lanes of a warp: lane l has columns l, l + 32, …
template <class C, int most>
struct LaneColumns {
  C value[most] = {};
  // Σ_j weight[j] rows[j]
  template <class T>
  __device__ void add(const C* weight, const T* rows, int head_dim) {
    for (int j = 0; j < tile; ++j) {
      const C w = weight[j];
      UNROLL for (int i = 0; i < most; ++i) {
        const int c = Warp().lane() + i * Warp::size;
        if (c < head_dim) value[i] += w * C(rows[j * padded(head_dim) + c]);
      }
    }
  }
  __device__ void scale(C by) { UNROLL for (int i = 0; i < most; ++i) value[i] *= by; }
  template <class T>
  __device__ void store(T* to, int head_dim) const {
    UNROLL for (int i = 0; i < most; ++i) {
      const int c = Warp().lane() + i * Warp::size;
      if (c < head_dim) to[c] = T(value[i]);
    }
  }
};

// Weights of a warp's row for the tile, where all its lanes can read them.
template <class C>
__device__ C* warp_weights() {
  SHARED_ARRAY(C, weights, 4 * 2 * tile);
  return weights + int(threadIdx.x) / Warp::size * 2 * tile;
}

template <class T, int most>
__global__ void __launch_bounds__(128) attention_kernel(AttentionArguments<T> a) {
  using C = Compute<T>;
  using Plan = AttentionPlan<T>;
  const int lane = Warp().lane(), warp = int(threadIdx.x) / Warp::size, d = a.head_dim;
  const int head = int(blockIdx.y), kv_head = head / a.group;
  const int first = int(blockIdx.x) * Plan::owned, end = min(first + Plan::owned, a.tokens);
  T* const q = dynamic_shared<T>();
  T* const k = q + Plan::owned * padded(d);
  T* const v = k + tile * padded(d);
  C* const weights = warp_weights<C>();
  load_rows(q, a.q, first, Plan::owned, end, head, d);

  LaneColumns<C, most> out[Plan::rows_each];
  C largest[Plan::rows_each], sum[Plan::rows_each];  // of this lane's keys, relative to `largest`
  int sees[Plan::rows_each];
  UNROLL for (int i = 0; i < Plan::rows_each; ++i) {
    const int t = first + warp * Plan::rows_each + i;
    largest[i] = lowest<C>, sum[i] = 0;
    sees[i] = t < end ? first_key(a, t) : t + 1;
  }
  for (int from = first_key(a, first); from < end; from += tile) {
    __syncthreads();
    load_rows(k, a.k, from, tile, end, kv_head, d);
    load_rows(v, a.v, from, tile, end, kv_head, d);
    __syncthreads();
    UNROLL for (int i = 0; i < Plan::rows_each; ++i) {
      const int row = warp * Plan::rows_each + i, t = first + row, j = from + lane;
      const bool is_seen = j >= sees[i] && j <= t;
      const C score = is_seen ? a.scale * dot(q + row * padded(d), k + lane * padded(d), d) : lowest<C>;
      const C now = larger(largest[i], Warp().max(score));
      const C weight = is_seen ? std::exp(score - now) : C(0);
      const C shrink = largest[i] == now ? C(1) : std::exp(largest[i] - now);
      largest[i] = now;
      sum[i] = sum[i] * shrink + weight;
      out[i].scale(shrink);
      __syncwarp();
      weights[lane] = weight;
      __syncwarp();
      out[i].add(weights, v, d);
    }
  }
  UNROLL for (int i = 0; i < Plan::rows_each; ++i) {
    const int t = first + warp * Plan::rows_each + i;
    const C total = Warp().sum(sum[i]);
    if (t >= end) continue;
    out[i].scale(C(1) / total);
    out[i].store(a.to_out[t] + head * d, d);
    if (lane == 0) a.to_log_sum[t][head] = largest[i] + std::log(total);
  }
}

// delta = Σ dout · out, a warp per token and head.
template <class T>
__global__ void attention_delta_kernel(AttentionArguments<T> a) {
  using C = Compute<T>;
  const std::int64_t row = std::int64_t(blockIdx.x) * (blockDim.x / Warp::size) + threadIdx.x / Warp::size;
  if (row >= std::int64_t(a.tokens) * a.q_heads) return;
  const std::int64_t t = row / a.q_heads, head = row % a.q_heads;
  C sum = 0;
  for (int c = Warp().lane(); c < a.head_dim; c += Warp::size)
    sum += C(a.dout[t][head * a.head_dim + c]) * C(a.out[t][head * a.head_dim + c]);
  sum = Warp().sum(sum);
  if (Warp().lane() == 0) a.delta[row] = sum;
}

// dq_t = scale Σ_j p_tj (dout_t · v_j − delta_t) k_j
template <class T, int most>
__global__ void __launch_bounds__(128) attention_dq_kernel(AttentionArguments<T> a) {
  using C = Compute<T>;
  using Plan = AttentionPlan<T>;
  const int lane = Warp().lane(), warp = int(threadIdx.x) / Warp::size, d = a.head_dim;
  const int head = int(blockIdx.y), kv_head = head / a.group;
  const int first = int(blockIdx.x) * Plan::owned, end = min(first + Plan::owned, a.tokens);
  T* const q = dynamic_shared<T>();
  T* const dout = q + Plan::owned * padded(d);
  T* const k = dout + Plan::owned * padded(d);
  T* const v = k + tile * padded(d);
  C* const weights = warp_weights<C>();
  load_rows(q, a.q, first, Plan::owned, end, head, d);
  load_rows(dout, a.dout, first, Plan::owned, end, head, d);

  LaneColumns<C, most> dq[Plan::rows_each];
  for (int from = first_key(a, first); from < end; from += tile) {
    __syncthreads();
    load_rows(k, a.k, from, tile, end, kv_head, d);
    load_rows(v, a.v, from, tile, end, kv_head, d);
    __syncthreads();
    UNROLL for (int i = 0; i < Plan::rows_each; ++i) {
      const int row = warp * Plan::rows_each + i, t = first + row, j = from + lane;
      C slope = 0;
      if (t < end && j >= first_key(a, t) && j <= t) {
        const C score = a.scale * dot(q + row * padded(d), k + lane * padded(d), d);
        const C p = std::exp(score - a.log_sum[t][head]);
        slope = p * (dot(dout + row * padded(d), v + lane * padded(d), d) - delta_of(a, t, head));
      }
      __syncwarp();
      weights[lane] = slope;
      __syncwarp();
      dq[i].add(weights, k, d);
    }
  }
  UNROLL for (int i = 0; i < Plan::rows_each; ++i) {
    const int t = first + warp * Plan::rows_each + i;
    if (t >= end) continue;
    dq[i].scale(a.scale);
    dq[i].store(a.dq[t] + head * d, d);
  }
}

// dv_j = Σ p_tj dout_t, dk_j = scale Σ p_tj (dout_t · v_j − delta_t) q_t, over the queries of all heads of the group.
template <class T, int most>
__global__ void __launch_bounds__(128) attention_dkdv_kernel(AttentionArguments<T> a) {
  using C = Compute<T>;
  using Plan = AttentionPlan<T>;
  const int lane = Warp().lane(), warp = int(threadIdx.x) / Warp::size, d = a.head_dim;
  const int kv_head = int(blockIdx.y);
  const int first = int(blockIdx.x) * Plan::owned, end = min(first + Plan::owned, a.tokens);
  const int query_end = last_query(a, end - 1) + 1;
  T* const k = dynamic_shared<T>();
  T* const v = k + Plan::owned * padded(d);
  T* const q = v + Plan::owned * padded(d);
  T* const dout = q + tile * padded(d);
  C *const weights = warp_weights<C>(), *const slopes = weights + tile;
  load_rows(k, a.k, first, Plan::owned, end, kv_head, d);
  load_rows(v, a.v, first, Plan::owned, end, kv_head, d);

  LaneColumns<C, most> dk[Plan::rows_each], dv[Plan::rows_each];
  for (int head = kv_head * a.group; head < (kv_head + 1) * a.group; ++head)
    for (int from = first; from < query_end; from += tile) {
      __syncthreads();
      load_rows(q, a.q, from, tile, query_end, head, d);
      load_rows(dout, a.dout, from, tile, query_end, head, d);
      __syncthreads();
      const int t = from + lane, sees = t < query_end ? first_key(a, t) : t + 1;
      UNROLL for (int i = 0; i < Plan::rows_each; ++i) {
        const int row = warp * Plan::rows_each + i, j = first + row;
        C p = 0, slope = 0;
        if (j < end && j >= sees && j <= t) {
          const C score = a.scale * dot(q + lane * padded(d), k + row * padded(d), d);
          p = std::exp(score - a.log_sum[t][head]);
          slope = p * (dot(dout + lane * padded(d), v + row * padded(d), d) - delta_of(a, t, head));
        }
        __syncwarp();
        weights[lane] = p;
        slopes[lane] = slope;
        __syncwarp();
        dv[i].add(weights, dout, d);
        dk[i].add(slopes, q, d);
      }
    }
  UNROLL for (int i = 0; i < Plan::rows_each; ++i) {
    const int j = first + warp * Plan::rows_each + i;
    if (j >= end) continue;
    dk[i].scale(a.scale);
    dk[i].store(a.dk[j] + kv_head * d, d);
    dv[i].store(a.dv[j] + kv_head * d, d);
  }
}

// --- host

// owned: tiles of the rows that a block owns; all: of these and of the other side.
template <class T>
Grid attention_grid(const AttentionArguments<T>& a, int heads, int owned, int others) {
  using Plan = AttentionPlan<T>;
  const std::size_t rows = std::size_t(owned * Plan::owned + others * tile);
  return Grid(dim3(as_blocks(blocks_for(a.tokens, Plan::owned)), unsigned(heads)), Plan::threads,
              rows * std::size_t(padded(a.head_dim)) * sizeof(T));
}

// body(columns of a head that a lane owns)
template <class Body>
void with_head_width(int head_dim, Body&& body) {
  check(head_dim <= 256, "attention on a GPU takes heads of at most 256 columns, not ", head_dim);
  head_dim <= 128 ? body(std::integral_constant<int, 4>()) : body(std::integral_constant<int, 8>());
}

template <class T>
void run_attention_plain(const AttentionArguments<T>& a, cudaStream_t stream) {
  with_head_width(a.head_dim, [&](auto most) {
    launch(attention_kernel<T, most()>, attention_grid(a, a.q_heads, 1, 2), stream, a);
  });
}

template <class T>
void run_attention_plain_backward(const AttentionArguments<T>& a, cudaStream_t stream) {
  with_head_width(a.head_dim, [&](auto most) {
    launch(attention_dq_kernel<T, most()>, attention_grid(a, a.q_heads, 2, 2), stream, a);
    launch(attention_dkdv_kernel<T, most()>, attention_grid(a, a.q_heads / a.group, 2, 2), stream, a);
  });
}

}  // namespace distill::cuda
