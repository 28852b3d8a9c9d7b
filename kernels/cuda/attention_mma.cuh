// Attention of bf16 and f16 with heads of 64 or 128 columns on tensor cores (Dao 2023, FlashAttention-2): products in
// 16 × 16 × 8 pieces with f32 sums; weights and their gradients are rounded to the type of the operands before they are
// multiplied, nothing else is. Which rows see which: attention_rows.cuh.
#pragma once

#include "kernels/cuda/language.h"  // before what includes the toolkit's headers

#include "kernels/cuda/attention_rows.cuh"

namespace distill::cuda {

constexpr int mma_threads = 128;  // 4 warps
constexpr int owned_rows = 64;    // of a block: 16 for each warp
constexpr float log2_of_e = 1.44269504f, ln_of_2 = 0.69314718f;

// Rows of a head in shared memory. 8 more columns: the 8 rows that a fragment reads at once meet different banks.
template <class T, int d>
struct Tile {
  static constexpr int stride = d + 8;
  T* data;

  static constexpr std::size_t bytes(int rows) { return std::size_t(rows) * stride * sizeof(T); }

  // Begins to copy rows [first, first + rows) of a head; those from `end` on are zeros.
  template <int rows>
  __device__ void copy(const Rows<const T>& from, int first, int end, int head) const {
    constexpr int chunks = d / 8;
    for (int i = int(threadIdx.x); i < rows * chunks; i += mma_threads) {
      const int r = i / chunks, c = i % chunks * 8;
      const bool is_there = first + r < end;
      copy_async_16(data + r * stride + c, from[is_there ? first + r : first] + head * d + c, is_there);
    }
  }

  // Fragments as language.h describes them. A [16, 16] at (row, column); B [16, 16] as two of 8 columns: of the rows as
  // columns, B[k][n] = tile[row + n][column + k], or as they are, B[k][n] = tile[row + k][column + n].
  __device__ void a(std::uint32_t (&r)[4], int row, int column) const {
    const int m = Warp().lane() / 8, j = Warp().lane() % 8;
    ldmatrix_x4(r, data + (row + m % 2 * 8 + j) * stride + column + m / 2 * 8);
  }
  __device__ void b_of_rows(std::uint32_t (&r)[4], int row, int column) const {
    const int m = Warp().lane() / 8, j = Warp().lane() % 8;
    ldmatrix_x4(r, data + (row + m / 2 * 8 + j) * stride + column + m % 2 * 8);
  }
  __device__ void b(std::uint32_t (&r)[4], int row, int column) const {
    const int m = Warp().lane() / 8, j = Warp().lane() % 8;
    ldmatrix_x4_transposed(r, data + (row + m % 2 * 8 + j) * stride + column + m / 2 * 8);
  }
};

// n pieces of 8 columns of a warp's 16 rows. A lane has rows g and g + 8 (g = lane / 4), columns 2i and 2i + 1
// (i = lane % 4) of each: value[piece][0..1] of row g, [2..3] of row g + 8.
template <int n>
struct Sums {
  float value[n][4] = {};
};

template <class T>
__device__ void multiply_pair(float (&left)[4], float (&right)[4], const std::uint32_t (&a)[4],
                              const std::uint32_t (&b)[4]) {
  const std::uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  mma_m16n8k16(left, a, first, T());
  mma_m16n8k16(right, a, second, T());
}

// sums = rows [row, row + 16) of x · (8n rows of y)ᵀ
template <class T, int d, int n>
__device__ void scores(Sums<n>& sums, const Tile<T, d>& x, int row, const Tile<T, d>& y) {
  sums = {};
  UNROLL for (int column = 0; column < d; column += 16) {
    std::uint32_t a[4];
    x.a(a, row, column);
    UNROLL for (int piece = 0; piece < n; piece += 2) {
      std::uint32_t b[4];
      y.b_of_rows(b, piece * 8, column);
      multiply_pair<T>(sums.value[piece], sums.value[piece + 1], a, b);
    }
  }
}

template <class T>
__device__ std::uint32_t as_pair(float lower, float upper) {
  return T(lower).bits | std::uint32_t(T(upper).bits) << 16;
}

// sums += round(weights) · (8n rows of y)
template <class T, int d, int n>
__device__ void add_weighted(Sums<d / 8>& sums, const Sums<n>& weights, const Tile<T, d>& y) {
  UNROLL for (int piece = 0; piece < n; piece += 2) {
    const auto& left = weights.value[piece];
    const auto& right = weights.value[piece + 1];
    const std::uint32_t a[4] = {as_pair<T>(left[0], left[1]), as_pair<T>(left[2], left[3]),
                                as_pair<T>(right[0], right[1]), as_pair<T>(right[2], right[3])};
    UNROLL for (int column = 0; column < d; column += 16) {
      std::uint32_t b[4];
      y.b(b, piece * 8, column);
      multiply_pair<T>(sums.value[column / 8], sums.value[column / 8 + 1], a, b);
    }
  }
}

// What a lane needs to know of its two rows: of rows g and g + 8.
struct LaneRows {
  int row[2];
};
__device__ inline LaneRows lane_rows(int first_of_warp) {
  const int g = first_of_warp + Warp().lane() / 4;
  return {{g, g + 8}};
}
__device__ inline int lane_column(int piece, int k) { return piece * 8 + Warp().lane() % 4 * 2 + k % 2; }

// The four lanes that share a row.
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(all_lanes, x, 1);
  return x + __shfl_xor_sync(all_lanes, x, 2);
}
__device__ inline float quad_max(float x) {
  x = larger(x, __shfl_xor_sync(all_lanes, x, 1));
  return larger(x, __shfl_xor_sync(all_lanes, x, 2));
}

template <class T, int d>
__device__ void store_rows(const Rows<T>& to, const Sums<d / 8>& sums, const LaneRows& lane, const float (&by)[2],
                           int end, int head) {
  UNROLL for (int half = 0; half < 2; ++half) {
    if (lane.row[half] >= end) continue;
    T* const row = to[lane.row[half]] + head * d;
    UNROLL for (int piece = 0; piece < d / 8; ++piece) {
      const float x[2] = {sums.value[piece][2 * half], sums.value[piece][2 * half + 1]};
      *reinterpret_cast<std::uint32_t*>(row + lane_column(piece, 0)) = as_pair<T>(x[0] * by[half], x[1] * by[half]);
    }
  }
}

template <class T, int d>
__global__ void __launch_bounds__(mma_threads) attention_mma_kernel(AttentionArguments<T> a) {
  constexpr int keys = 64, pieces = keys / 8;
  const int head = int(blockIdx.y), kv_head = head / a.group, warp = int(threadIdx.x) / Warp::size;
  const int first = int(blockIdx.x) * owned_rows, end = min(first + owned_rows, a.tokens);
  const Tile<T, d> q{dynamic_shared<T>()}, k{q.data + owned_rows * q.stride}, v{k.data + keys * k.stride};
  const int low = first_key(a, first);
  q.template copy<owned_rows>(a.q, first, end, head);
  k.template copy<keys>(a.k, low, end, kv_head);
  copy_async_commit();
  v.template copy<keys>(a.v, low, end, kv_head);
  copy_async_commit();

  const LaneRows lane = lane_rows(first + warp * 16);
  int sees[2];
  for (int half = 0; half < 2; ++half)
    sees[half] = lane.row[half] < end ? first_key(a, lane.row[half]) : lane.row[half] + 1;
  const float to_log2 = a.scale * log2_of_e;
  constexpr float none = -std::numeric_limits<float>::infinity();
  float largest[2] = {none, none}, total[2] = {0, 0};  // of scores in powers of two; totals of this lane's columns
  Sums<d / 8> out;
  for (int from = low; from < end; from += keys) {
    copy_async_wait<1>();  // keys are there, values may be on their way
    __syncthreads();
    Sums<pieces> s;
    scores<T, d>(s, q, warp * 16, k);
    __syncthreads();
    if (from + keys < end) k.template copy<keys>(a.k, from + keys, end, kv_head);
    copy_async_commit();
    UNROLL for (int half = 0; half < 2; ++half) {
      float most = none;
      UNROLL for (int i = 0; i < 2 * pieces; ++i) {
        float& x = s.value[i / 2][2 * half + i % 2];
        const int key = from + lane_column(i / 2, i);
        x = key >= sees[half] && key <= lane.row[half] ? x * to_log2 : none;
        most = larger(most, x);
      }
      most = larger(largest[half], quad_max(most));
      const float base = most == none ? 0.0f : most, shrink = exp2f(largest[half] - base);
      largest[half] = most;
      total[half] *= shrink;
      UNROLL for (int i = 0; i < d / 4; ++i) out.value[i / 2][2 * half + i % 2] *= shrink;
      UNROLL for (int i = 0; i < 2 * pieces; ++i) {
        float& x = s.value[i / 2][2 * half + i % 2];
        x = exp2f(x - base);
        total[half] += x;
      }
    }
    copy_async_wait<1>();  // values are there, the next keys may be on their way
    __syncthreads();
    add_weighted<T, d>(out, s, v);
    __syncthreads();
    if (from + keys < end) v.template copy<keys>(a.v, from + keys, end, kv_head);
    copy_async_commit();
  }
  float inverse[2];
  for (int half = 0; half < 2; ++half) {
    total[half] = quad_sum(total[half]);
    inverse[half] = 1 / total[half];
    if (lane.row[half] < end && Warp().lane() % 4 == 0)
      a.to_log_sum[lane.row[half]][head] = largest[half] * ln_of_2 + std::log(total[half]);
  }
  store_rows<T, d>(a.to_out, out, lane, inverse, end, head);
}

// dq_t = scale Σ_j p_tj (dout_t · v_j − delta_t) k_j
template <class T, int d>
__global__ void __launch_bounds__(mma_threads) attention_mma_dq_kernel(AttentionArguments<T> a) {
  constexpr int keys = 32, pieces = keys / 8;
  const int head = int(blockIdx.y), kv_head = head / a.group, warp = int(threadIdx.x) / Warp::size;
  const int first = int(blockIdx.x) * owned_rows, end = min(first + owned_rows, a.tokens);
  const Tile<T, d> q{dynamic_shared<T>()}, dout{q.data + owned_rows * q.stride}, k{dout.data + owned_rows * q.stride},
      v{k.data + keys * k.stride};
  q.template copy<owned_rows>(a.q, first, end, head);
  dout.template copy<owned_rows>(a.dout, first, end, head);

  const LaneRows lane = lane_rows(first + warp * 16);
  int sees[2];
  float log_sum[2], delta[2];  // in powers of two
  for (int half = 0; half < 2; ++half) {
    const int t = lane.row[half];
    const bool is_there = t < end;
    sees[half] = is_there ? first_key(a, t) : t + 1;
    log_sum[half] = is_there ? a.log_sum[t][head] * log2_of_e : 0.0f;
    delta[half] = is_there ? delta_of(a, t, head) : 0.0f;
  }
  const float to_log2 = a.scale * log2_of_e;
  Sums<d / 8> dq;
  for (int from = first_key(a, first); from < end; from += keys) {
    __syncthreads();
    k.template copy<keys>(a.k, from, end, kv_head);
    v.template copy<keys>(a.v, from, end, kv_head);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    Sums<pieces> s, slope;
    scores<T, d>(s, q, warp * 16, k);
    scores<T, d>(slope, dout, warp * 16, v);
    UNROLL for (int i = 0; i < 4 * pieces; ++i) {
      const int half = i % 4 / 2, key = from + lane_column(i / 4, i);
      const bool is_seen = key >= sees[half] && key <= lane.row[half];
      const float p = is_seen ? exp2f(s.value[i / 4][i % 4] * to_log2 - log_sum[half]) : 0.0f;
      float& x = slope.value[i / 4][i % 4];
      x = p * (x - delta[half]);
    }
    add_weighted<T, d>(dq, slope, k);
  }
  const float by[2] = {a.scale, a.scale};
  store_rows<T, d>(a.dq, dq, lane, by, end, head);
}

// dv_j = Σ p_tj dout_t, dk_j = scale Σ p_tj (dout_t · v_j − delta_t) q_t: here a row is a key, a column a query.
template <class T, int d>
__global__ void __launch_bounds__(mma_threads) attention_mma_dkdv_kernel(AttentionArguments<T> a) {
  constexpr int queries = 32, pieces = queries / 8;
  SHARED_ARRAY(float, log_sum, queries);  // in powers of two
  SHARED_ARRAY(float, delta, queries);
  SHARED_ARRAY(int, sees, queries);
  const int kv_head = int(blockIdx.y), warp = int(threadIdx.x) / Warp::size;
  const int first = int(blockIdx.x) * owned_rows, end = min(first + owned_rows, a.tokens);
  const int query_end = last_query(a, end - 1) + 1;
  const Tile<T, d> k{dynamic_shared<T>()}, v{k.data + owned_rows * k.stride}, q{v.data + owned_rows * k.stride},
      dout{q.data + queries * q.stride};
  k.template copy<owned_rows>(a.k, first, end, kv_head);
  v.template copy<owned_rows>(a.v, first, end, kv_head);

  const LaneRows lane = lane_rows(first + warp * 16);
  const float to_log2 = a.scale * log2_of_e;
  Sums<d / 8> dk, dv;
  for (int head = kv_head * a.group; head < (kv_head + 1) * a.group; ++head)
    for (int from = first; from < query_end; from += queries) {
      __syncthreads();
      q.template copy<queries>(a.q, from, query_end, head);
      dout.template copy<queries>(a.dout, from, query_end, head);
      copy_async_commit();
      if (threadIdx.x < queries) {
        const int t = from + int(threadIdx.x);
        const bool is_there = t < query_end;
        sees[threadIdx.x] = is_there ? first_key(a, t) : t + 1;
        log_sum[threadIdx.x] = is_there ? a.log_sum[t][head] * log2_of_e : 0.0f;
        delta[threadIdx.x] = is_there ? delta_of(a, t, head) : 0.0f;
      }
      copy_async_wait<0>();
      __syncthreads();
      Sums<pieces> p, slope;
      scores<T, d>(p, k, warp * 16, q);
      scores<T, d>(slope, v, warp * 16, dout);
      UNROLL for (int i = 0; i < 4 * pieces; ++i) {
        const int column = lane_column(i / 4, i), key = lane.row[i % 4 / 2];
        const bool is_seen = key < end && key >= sees[column] && key <= from + column;
        float &weight = p.value[i / 4][i % 4], &x = slope.value[i / 4][i % 4];
        weight = is_seen ? exp2f(weight * to_log2 - log_sum[column]) : 0.0f;
        x = weight * (x - delta[column]);
      }
      add_weighted<T, d>(dv, p, dout);
      add_weighted<T, d>(dk, slope, q);
    }
  const float one[2] = {1, 1}, by[2] = {a.scale, a.scale};
  store_rows<T, d>(a.dv, dv, lane, one, end, kv_head);
  store_rows<T, d>(a.dk, dk, lane, by, end, kv_head);
}

// --- host

// Tensor cores take heads of 64 and 128 columns whose rows begin at multiples of 16 bytes.
template <class... Operand>
bool suits_mma(int head_dim, const Rows<Operand>&... operands) {
  return (head_dim == 64 || head_dim == 128) && (operands.is_aligned && ...);
}
template <class Body>
void with_mma_head(int head_dim, Body&& body) {
  head_dim == 64 ? body(std::integral_constant<int, 64>()) : body(std::integral_constant<int, 128>());
}
template <class T, int d>
Grid mma_grid(int tokens, int heads, int rows) {
  return Grid(dim3(as_blocks(blocks_for(tokens, owned_rows)), unsigned(heads)), mma_threads, Tile<T, d>::bytes(rows));
}

template <class T>
void run_attention_mma(const AttentionArguments<T>& a, cudaStream_t stream) {
  with_mma_head(a.head_dim, [&](auto d) {
    launch(attention_mma_kernel<T, d()>, mma_grid<T, d()>(a.tokens, a.q_heads, owned_rows + 128), stream, a);
  });
}

template <class T>
void run_attention_mma_backward(const AttentionArguments<T>& a, cudaStream_t stream) {
  with_mma_head(a.head_dim, [&](auto d) {
    constexpr int rows = 2 * owned_rows + 64;
    launch(attention_mma_dq_kernel<T, d()>, mma_grid<T, d()>(a.tokens, a.q_heads, rows), stream, a);
    launch(attention_mma_dkdv_kernel<T, d()>, mma_grid<T, d()>(a.tokens, a.q_heads / a.group, rows), stream, a);
  });
}

}  // namespace distill::cuda
