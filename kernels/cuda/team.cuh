// Teams (kernels/team.h) of GPU threads. Reductions have a fixed order, every lane gets the result, and all lanes of
// the team must call them.
#pragma once

#include <algorithm>

#include "kernels/cuda/language.h"
#include "kernels/cuda/memory.cuh"

namespace distill::cuda {

constexpr unsigned all_lanes = 0xffffffffu;

template <class T>
__device__ T larger(T a, T b) {
  return b > a ? b : a;
}

// 32 consecutive threads; blocks are a multiple of that.
struct Warp {
  static constexpr int size = 32;
  __device__ int lane() const { return int(threadIdx.x) % size; }
  __device__ int lanes() const { return size; }
  template <class T>
  __device__ T sum(T x) const {
    for (int distance = size / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(all_lanes, x, distance);
    return x;
  }
  template <class T>
  __device__ T max(T x) const {
    for (int distance = size / 2; distance > 0; distance /= 2) x = larger(x, __shfl_xor_sync(all_lanes, x, distance));
    return x;
  }
};

// All threads of a one-dimensional block. Every reduction is a barrier before which all earlier writes of the block are
// seen after it.
struct Block {
  static constexpr int most_warps = 32, most_values = 16;
  __device__ int lane() const { return int(threadIdx.x); }
  __device__ int lanes() const { return int(blockDim.x); }
  template <class T>
  __device__ T sum(T x) const {
    sum_each(&x, 1);
    return x;
  }
  template <class T>
  __device__ T max(T x) const {
    SHARED_ARRAY(T, of_warp, most_warps);
    x = Warp().max(x);
    if (Warp().lane() == 0) of_warp[warp()] = x;
    __syncthreads();
    x = of_warp[0];
    for (int w = 1; w < warps(); ++w) x = larger(x, of_warp[w]);
    __syncthreads();
    return x;
  }
  // n ≤ most_values sums at once
  template <class T>
  __device__ void sum_each(T* x, int n) const {
    SHARED_ARRAY(T, of_warp, most_warps * most_values);
    for (int i = 0; i < n; ++i) {
      const T total = Warp().sum(x[i]);
      if (Warp().lane() == 0) of_warp[warp() * n + i] = total;
    }
    __syncthreads();
    for (int i = 0; i < n; ++i) {
      T total = of_warp[i];
      for (int w = 1; w < warps(); ++w) total += of_warp[w * n + i];
      x[i] = total;
    }
    __syncthreads();
  }
  // As in kernels/team.h. A lane takes 8 neighbours at a time, 2 where there are doubles; those that are left over at
  // the end are taken one a lane. Who takes what does not depend on alignment.
  template <class Body, class... T>
  __device__ void for_elements(std::int64_t n, Body&& body, const T*... x) const {
    const auto visit = [&]<int count>(std::int64_t j, const Few<T, count>&... few) {
      UNROLL
      for (int i = 0; i < count; ++i) body(j + i, few.value[i]...);
    };
    for_packs(n, visit, x...);
  }
  template <class To, class Body, class... T>
  __device__ void write_elements(To* to, std::int64_t n, Body&& body, const T*... x) const {
    const auto write = [&]<int count>(std::int64_t j, const Few<T, count>&... few) {
      Few<To, count> results;
      UNROLL
      for (int i = 0; i < count; ++i) results.value[i] = To(body(j + i, few.value[i]...));
      store(to + j, results, count, is_aligned(to, 0));
    };
    for_packs(n, write, x...);
  }

 private:
  template <class Body, class... T>
  __device__ void for_packs(std::int64_t n, Body&& body, const T*... x) const {
    constexpr int few = std::max({sizeof(T)...}) > 4 ? 2 : 8;
    const std::int64_t whole = n - n % few;
    for (std::int64_t j = std::int64_t(lane()) * few; j < whole; j += std::int64_t(lanes()) * few)
      body(j, read<few>(x, j)...);
    static_assert(few <= Warp::size);  // so that there are enough lanes
    if (const std::int64_t j = whole + lane(); j < n) body(j, read<1>(x, j)...);
  }
  template <int n, class T>
  __device__ static Few<T, n> read(const T* x, std::int64_t j) {
    return x ? load<n>(x + j, n, is_aligned(x, 0)) : Few<T, n>{};
  }

  __device__ int warp() const { return int(threadIdx.x) / Warp::size; }
  __device__ int warps() const { return int(blockDim.x) / Warp::size; }
};

}  // namespace distill::cuda
