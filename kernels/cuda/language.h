// The device language: what every .cu file includes, and all it may use beyond C++. Compiled by nvcc it is CUDA;
// compiled by the host compiler (g++ -x c++) the same names come from virtual_gpu/device.h, which runs kernels without
// a GPU. This is the only file that knows which of the two it is.
//
//   SHARED_ARRAY(float, tile, 32 * 33);     // float* tile: 1056 floats of the block, 16-byte aligned, not initialised
//   float* rest = dynamic_shared<float>();  // the memory asked for by Grid::shared_bytes
//   launch(kernel, Grid(blocks, threads, bytes), stream, args...);
//   threadIdx, __syncthreads, __shfl_*_sync, votes, atomics, __ldg, __expf …: as in CUDA
//   assume_global(p);          // p points to device memory, which nvcc does not see through structs: LDG, not LD
//   mma_m16n8k16, ldmatrix_x4, copy_async_16 …: below, the only way to tensor cores and asynchronous copies
//
// A plain `__shared__` or a launch in angle brackets does not compile under the host compiler.
#pragma once

#if defined(__CUDACC__)

// Before a loop whose arrays must live in registers: nvcc is told to unroll it. The host compiler needs no telling.
#define UNROLL _Pragma("unroll")

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Bytes, because shared memory may not have the constructors of bf16 and f16.
#define SHARED_ARRAY(T, name, n)                                        \
  __shared__ __align__(16) unsigned char name##_bytes[sizeof(T) * (n)]; \
  T* const name = reinterpret_cast<T*>(name##_bytes)

#else

#define UNROLL

#include "virtual_gpu/device.h"

#define SHARED_ARRAY(T, name, n)    \
  static const char name##_key = 0; \
  T* const name = static_cast<T*>(::virtual_gpu::shared_array(&name##_key, sizeof(T) * (n), #name))

#endif

#include <cstddef>
#include <cstdint>
#include <source_location>

#include "core/number.h"
#include "kernels/cuda/check.h"

namespace distill::cuda {

// How many blocks of how many threads, bytes of dynamic shared memory for each block, and the line that asks.
struct Grid {
  dim3 blocks, threads;
  std::size_t shared_bytes;
  std::source_location where;
  Grid(dim3 blocks_, dim3 threads_, std::size_t shared_bytes_ = 0,
       const std::source_location& where_ = std::source_location::current())
      : blocks(blocks_), threads(threads_), shared_bytes(shared_bytes_), where(where_) {}
};

#if defined(__CUDACC__)

template <class Kernel>
void make_launchable(Kernel*) {}

__device__ inline void assume_global(const void* address) { __builtin_assume(__isGlobal(address)); }

template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

namespace language {
__device__ inline unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}
}  // namespace language

__device__ inline void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], f16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(language::shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x4_transposed(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(language::shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x2(std::uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(language::shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x2_transposed(std::uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(language::shared_address(row))
               : "memory");
}

__device__ inline void copy_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(language::shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#else

inline void assume_global(const void*) {}

template <class... P>
void make_launchable(void (*kernel)(P...)) {
  ::virtual_gpu::make_launchable(kernel);
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(::virtual_gpu::dynamic_shared());
}

template <class T>
void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], T,
                  ::virtual_gpu::Site site = {}) {
  constexpr auto format = std::is_same_v<T, bf16> ? ::virtual_gpu::Half::bf16 : ::virtual_gpu::Half::f16;
  ::virtual_gpu::mma_m16n8k16(d, a, b, format, site);
}
using ::virtual_gpu::copy_async_16;
using ::virtual_gpu::copy_async_commit;
using ::virtual_gpu::copy_async_wait;
using ::virtual_gpu::ldmatrix_x2;
using ::virtual_gpu::ldmatrix_x2_transposed;
using ::virtual_gpu::ldmatrix_x4;
using ::virtual_gpu::ldmatrix_x4_transposed;

#endif

// What they do (PTX ISA, "Warp Level Matrix Instructions"; all 32 lanes call; g = lane / 4, i = lane % 4; the lower
// half of a register is the element with the lower index):
//
// mma_m16n8k16(d, a, b, T{}): D [16, 8] += A [16, 16] B [16, 8], T = bf16 or f16, sums in f32.
//   a[0]: A[g][2i..2i+1]   a[1]: A[g+8][2i..]   a[2]: A[g][2i+8..]   a[3]: A[g+8][2i+8..]
//   b[0]: B[2i..2i+1][g]   b[1]: B[2i+8..2i+9][g]
//   d[0..1]: D[g][2i..2i+1]   d[2..3]: D[g+8][2i..2i+1]
//
// ldmatrix_x4(r, row): four 8×8 matrices of 16-bit numbers from shared memory; lane 8m + j gives the 16-byte aligned
// address of row j of matrix m. r[m] = M_m[g][2i..2i+1]; transposed: M_m[2i..2i+1][g]. _x2: two matrices, addresses of
// lanes 0–15.
//
// copy_async_16(shared, global, valid): 16 bytes, both 16-byte aligned, without registers; zeros when !valid (global is
// then not read). They belong to the group that copy_async_commit closes; copy_async_wait<n> waits until at most n
// groups of this thread are unfinished. Other threads see the bytes after a barrier that follows the wait.

inline void ask_for_shared_memory(const void* kernel, const Grid& grid) {
  int device = 0, most = 0;
  cuda_check(cudaGetDevice(&device), grid.where);
  cuda_check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), grid.where);
  check(grid.shared_bytes <= std::size_t(most), "the kernel at ", grid.where.file_name(), ":", grid.where.line(),
        " needs ", grid.shared_bytes, " bytes of shared memory a block, this GPU gives ", most);
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared_bytes)),
             grid.where);
}

// Puts the kernel on the stream. No blocks: nothing. Throws when the launch fails, with the caller's line.
template <class... P, class... A>
void launch(void (*kernel)(P...), const Grid& grid, cudaStream_t stream, const A&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "the kernel takes another number of arguments");
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
  make_launchable(kernel);
  // 48 KiB are given without asking, for both kinds together; no kernel has more than 16 KiB of arrays of its own.
  constexpr std::size_t given_without_asking = (48 - 16) << 10;
  if (grid.shared_bytes > given_without_asking) ask_for_shared_memory(reinterpret_cast<const void*>(kernel), grid);
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  cuda_check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...), grid.where);
}

}  // namespace distill::cuda
