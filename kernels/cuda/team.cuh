// Teams (kernels/team.h) of GPU threads. Reductions have a fixed order, every lane gets the result, and all lanes of
// the team must call them.
#pragma once

#include "kernels/cuda/language.h"

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

 private:
  __device__ int warp() const { return int(threadIdx.x) / Warp::size; }
  __device__ int warps() const { return int(blockDim.x) / Warp::size; }
};

}  // namespace distill::cuda
