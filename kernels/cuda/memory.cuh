// Device memory as kernels see it: rows of a view, and a few neighbouring elements at a time, 16 bytes an access where
// they are aligned.
#pragma once

#include "core/tensor.h"
#include "kernels/cuda/language.h"

namespace distill::cuda {

// Rows of a view. is_aligned: every row begins at a multiple of 16 bytes.
template <class T>
struct Rows {
  T* data = nullptr;
  std::int64_t stride = 0;
  bool is_aligned = false;
  __device__ T* operator[](std::int64_t row) const { return data + row * stride; }
};

template <class T>
DISTILL_HD bool is_aligned(const T* data, std::int64_t stride) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && std::size_t(stride) * sizeof(T) % 16 == 0;
}
template <class T>
Rows<const T> rows_of(const ConstView& v) {
  const T* data = v.as<T>();
  return {data, v.stride, is_aligned(data, v.rows > 1 ? v.stride : 0)};
}
template <class T>
Rows<T> rows_of(const View& v) {
  T* data = v.as<T>();
  return {data, v.stride, is_aligned(data, v.rows > 1 ? v.stride : 0)};
}

// As many elements as fill 16 bytes of T.
template <class T>
inline constexpr int pack = 16 / int(sizeof(T));

// n neighbouring elements in registers.
template <class T, int n>
struct Few {
  T value[n];
};

// The first `count` of n elements; the others are 0. Whole and aligned: n·sizeof(T)/16 loads.
template <int n, class T>
__device__ Few<std::remove_const_t<T>, n> load(const T* from, int count, bool is_aligned) {
  using Value = std::remove_const_t<T>;
  assume_global(from);
  Few<Value, n> few;
  if constexpr (n * sizeof(T) % 16 == 0) {
    if (is_aligned && count == n) {
      constexpr int parts = n * int(sizeof(T)) / 16;
      struct Parts {
        uint4 part[parts];
      } parts_of;
      for (int i = 0; i < parts; ++i) parts_of.part[i] = reinterpret_cast<const uint4*>(from)[i];
      return std::bit_cast<Few<Value, n>>(parts_of);
    }
  }
  for (int i = 0; i < n; ++i) few.value[i] = i < count ? from[i] : Value(Compute<Value>(0));
  return few;
}

template <int n, class T>
__device__ void store(T* to, const Few<T, n>& few, int count, bool is_aligned) {
  assume_global(to);
  if constexpr (n * sizeof(T) % 16 == 0) {
    if (is_aligned && count == n) {
      constexpr int parts = n * int(sizeof(T)) / 16;
      struct Parts {
        uint4 part[parts];
      };
      const auto parts_of = std::bit_cast<Parts>(few);
      for (int i = 0; i < parts; ++i) reinterpret_cast<uint4*>(to)[i] = parts_of.part[i];
      return;
    }
  }
  for (int i = 0; i < n; ++i)
    if (i < count) to[i] = few.value[i];
}

// --- every element of equally shaped views, n neighbours a thread

struct Chunks {
  std::int64_t rows, cols;
  Grid grid;
};

inline std::int64_t blocks_for(std::int64_t items, std::int64_t per_block) {
  return (items + per_block - 1) / per_block;
}
inline unsigned as_blocks(std::int64_t blocks) {
  check(blocks <= 0x7fffffff, "a grid of ", blocks, " blocks");
  return unsigned(blocks);
}

// Blocks of 256 threads that cover rows × cols, n columns a thread; rows beyond the grid's height are taken in turns.
inline Chunks chunks_of(std::int64_t rows, std::int64_t cols, int n) {
  const std::int64_t across = blocks_for(cols, n);
  unsigned wide = 256;
  while (wide > 1 && wide / 2 >= across) wide /= 2;
  const unsigned high = 256 / wide;
  const std::int64_t down = std::min<std::int64_t>(blocks_for(rows, high), 65535);
  return {rows, cols, Grid(dim3(as_blocks(blocks_for(across, wide)), unsigned(down)), dim3(wide, high))};
}

// Contiguous views count as one row.
template <class... Views>
Chunks chunks_of_all(int n, const ConstView& v, const Views&... others) {
  const bool is_flat = v.contiguous() && (others.contiguous() && ...);
  return is_flat ? chunks_of(v.size() > 0, v.size(), n) : chunks_of(v.rows, v.cols, n);
}

// body(row, first column, columns ≤ n) for this thread's share of rows × cols.
template <int n, class Body>
__device__ void for_chunks(std::int64_t rows, std::int64_t cols, Body&& body) {
  const std::int64_t first = (std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * n;
  if (first >= cols) return;
  const int count = int(cols - first < n ? cols - first : n);
  for (std::int64_t r = std::int64_t(blockIdx.y) * blockDim.y + threadIdx.y; r < rows;
       r += std::int64_t(gridDim.y) * blockDim.y)
    body(r, first, count);
}

}  // namespace distill::cuda
