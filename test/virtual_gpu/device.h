// What kernels/cuda/language.h takes from the virtual GPU: CUDA's built-in variables and functions as plain C++, for
// one fiber per CUDA thread. Only .cu files compiled by the host compiler see this. Where CUDA leaves something
// undefined (a mask that does not name the caller, a barrier that some threads never reach) the virtual GPU reports the
// line.
#pragma once

// Before the toolkit's headers, which define some of them for nvcc only.
#define __host__
#define __device__
#define __global__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>

// Shared memory only through SHARED_ARRAY: here it would be a local variable of each thread.
#undef __shared__
#define __shared__ static_assert(false, "use SHARED_ARRAY");

// Built-in variables: those of the CUDA thread that runs now.
constexpr int warpSize = 32;
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace virtual_gpu {

// The line of a call, taken by a default argument.
struct Site {
  const char* file;
  int line;
  Site(const char* f = __builtin_FILE(), int l = __builtin_LINE()) : file(f), line(l) {}
};

extern int lane;  // of the CUDA thread that runs now, 0 to 31

// --- executor.cpp

// Remembers how to call the kernel with the arguments that cudaLaunchKernelExC gets as pointers.
struct Body {  // one CUDA thread
  std::shared_ptr<const void> bound;
  void (*run)(const void* bound);
};
using Bind = Body (*)(const void* kernel, void** arguments);  // copies the arguments
void make_launchable(const void* kernel, Bind bind);

// Memory of this block, the same for all its threads; full of NaN when first asked for.
void* shared_array(const void* key, std::size_t bytes, const char* name);
void* dynamic_shared();

enum class Vote { none, count, all, any };
int block_barrier(Vote vote, bool value, Site site);

// The lanes of mask meet; each leaves up to 32 bytes, and all see what the others left until their next meeting.
struct alignas(16) Left {
  unsigned char bytes[32];
};
enum class Orders { nothing, memory };  // whether what lanes wrote before is visible to the others afterwards
const Left* warp_meet(unsigned mask, const char* operation, const void* data, std::size_t bytes, Orders orders,
                      Site site);
void bad_source_lane(int from, unsigned mask, const char* operation, Site site);
[[noreturn]] void trap(Site site);

// Atomics: one thread at a time runs anyway, so what is left is to tell the race check.
void note_atomic(const void* address, std::size_t bytes);
__attribute__((no_sanitize("thread"))) inline std::uint64_t load_raw(const void* address, std::size_t bytes) {
  std::uint64_t word = 0;
  __builtin_memcpy(&word, address, bytes);
  return word;
}
__attribute__((no_sanitize("thread"))) inline void store_raw(void* address, std::uint64_t word, std::size_t bytes) {
  __builtin_memcpy(address, &word, bytes);
}

// Fragments as kernels/cuda/language.h describes them: d[4], a[4], b[2]; matrices of r.
enum class Half { bf16, f16 };
void mma_m16n8k16(float* d, const std::uint32_t* a, const std::uint32_t* b, Half format, Site site);
void ldmatrix(std::uint32_t* r, int matrices, bool transposed, const void* row, Site site);

// Copies that arrive when the thread waits for them.
void copy_async_16(void* shared, const void* global, bool valid = true, Site site = {});
void copy_async_commit();
void copy_async_wait_for(int pending);
template <int pending>
void copy_async_wait() {
  copy_async_wait_for(pending);
}

// --- templates over them

// A kernel and a copy of its arguments. Outside the race check: where the copy lies is no matter of the kernel's.
template <class Indices, class... P>
struct Bound;
template <std::size_t... i, class... P>
struct Bound<std::index_sequence<i...>, P...> {
  void (*kernel)(P...);
  std::tuple<P...> arguments;
  __attribute__((no_sanitize("thread"))) static void run(const void* bound) {
    const Bound& b = *static_cast<const Bound*>(bound);
    b.kernel(std::get<i>(b.arguments)...);
  }
  static Body bind(const void* kernel, void** arguments) {
    const auto function = reinterpret_cast<void (*)(P...)>(const_cast<void*>(kernel));
    return {std::make_shared<Bound>(Bound{function, {*static_cast<P*>(arguments[i])...}}), run};
  }
};
template <class... P>
void make_launchable(void (*kernel)(P...)) {
  make_launchable(reinterpret_cast<const void*>(kernel), Bound<std::index_sequence_for<P...>, P...>::bind);
}

template <class T>
std::uint64_t to_word(const T& x) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  std::uint64_t word = 0;
  std::memcpy(&word, &x, sizeof x);
  return word;
}
template <class T>
T from_bytes(const void* bytes) {
  T x;
  std::memcpy(&x, bytes, sizeof x);
  return x;
}

// source(lane, first and last lane of the caller's segment): whose value to take.
template <class T, class Source>
T shuffle(unsigned mask, const T& value, int width, const char* operation, Site site, Source source) {
  const std::uint64_t word = to_word(value);
  const int first = lane & ~(width - 1), last = first + width - 1;
  const Left* left = warp_meet(mask, operation, &word, sizeof word, Orders::nothing, site);
  const int from = source(lane, first, last);
  if (!(mask >> from & 1)) bad_source_lane(from, mask, operation, site);
  return from_bytes<T>(left[from].bytes);
}

// Folds what the lanes of mask hold, in lane order.
template <class T, class Fold>
T warp_reduce(unsigned mask, T value, const char* operation, Site site, Fold fold) {
  const Left* left = warp_meet(mask, operation, &value, sizeof value, Orders::nothing, site);
  bool first = true;
  T result{};
  for (int other = 0; other < 32; ++other) {
    if (!(mask >> other & 1)) continue;
    const T theirs = from_bytes<T>(left[other].bytes);
    result = first ? theirs : fold(result, theirs);
    first = false;
  }
  return result;
}

// *address = change(*address); returns what was there.
template <class T, class Change>
T atomic_change(T* address, Change change) {
  note_atomic(address, sizeof(T));
  const std::uint64_t word = load_raw(address, sizeof(T));
  const T old = from_bytes<T>(&word);
  store_raw(address, to_word(T(change(old))), sizeof(T));
  return old;
}

inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* row, Site s = {}) { ldmatrix(r, 4, false, row, s); }
inline void ldmatrix_x4_transposed(std::uint32_t (&r)[4], const void* row, Site s = {}) {
  ldmatrix(r, 4, true, row, s);
}
inline void ldmatrix_x2(std::uint32_t (&r)[2], const void* row, Site s = {}) { ldmatrix(r, 2, false, row, s); }
inline void ldmatrix_x2_transposed(std::uint32_t (&r)[2], const void* row, Site s = {}) {
  ldmatrix(r, 2, true, row, s);
}

}  // namespace virtual_gpu

// --- barriers and fences

inline void __syncthreads(virtual_gpu::Site site = {}) {
  virtual_gpu::block_barrier(virtual_gpu::Vote::none, false, site);
}
inline int __syncthreads_count(int value, virtual_gpu::Site site = {}) {
  return virtual_gpu::block_barrier(virtual_gpu::Vote::count, value != 0, site);
}
inline int __syncthreads_and(int value, virtual_gpu::Site site = {}) {
  return virtual_gpu::block_barrier(virtual_gpu::Vote::all, value != 0, site);
}
inline int __syncthreads_or(int value, virtual_gpu::Site site = {}) {
  return virtual_gpu::block_barrier(virtual_gpu::Vote::any, value != 0, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, virtual_gpu::Site site = {}) {
  virtual_gpu::warp_meet(mask, "__syncwarp", nullptr, 0, virtual_gpu::Orders::memory, site);
}
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}
#define __trap() ::virtual_gpu::trap(::virtual_gpu::Site(__FILE__, __LINE__))

// --- warps

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, virtual_gpu::Site site = {}) {
  return virtual_gpu::shuffle(mask, value, width, "__shfl_sync", site,
                              [=](int, int first, int) { return first + (source & (width - 1)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, virtual_gpu::Site site = {}) {
  return virtual_gpu::shuffle(mask, value, width, "__shfl_up_sync", site, [=](int me, int first, int) {
    const int from = me - static_cast<int>(delta);
    return from < first ? me : from;
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, virtual_gpu::Site site = {}) {
  return virtual_gpu::shuffle(mask, value, width, "__shfl_down_sync", site, [=](int me, int, int last) {
    const int from = me + static_cast<int>(delta);
    return from > last ? me : from;
  });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, virtual_gpu::Site site = {}) {
  return virtual_gpu::shuffle(mask, value, width, "__shfl_xor_sync", site, [=](int me, int, int last) {
    const int from = me ^ lane_mask;
    return from > last ? me : from;
  });
}
inline unsigned __ballot_sync(unsigned mask, int predicate, virtual_gpu::Site site = {}) {
  const unsigned mine = predicate ? 1u << virtual_gpu::lane : 0;
  return virtual_gpu::warp_reduce(mask, mine, "__ballot_sync", site, std::bit_or<unsigned>());
}
inline int __any_sync(unsigned mask, int predicate, virtual_gpu::Site site = {}) {
  return virtual_gpu::warp_reduce(mask, int{predicate != 0}, "__any_sync", site, std::bit_or<int>());
}
inline int __all_sync(unsigned mask, int predicate, virtual_gpu::Site site = {}) {
  return virtual_gpu::warp_reduce(mask, int{predicate != 0}, "__all_sync", site, std::bit_and<int>());
}

// --- atomics: int, unsigned, unsigned long long; float and double where CUDA has them

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return virtual_gpu::atomic_change(address, [=](T old) { return old + value; });
}
template <class T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return virtual_gpu::atomic_change(address, [=](T old) { return old - value; });
}
template <std::integral T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return virtual_gpu::atomic_change(address, [=](T old) { return old < value ? value : old; });
}
template <std::integral T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return virtual_gpu::atomic_change(address, [=](T old) { return value < old ? value : old; });
}
template <std::integral T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return virtual_gpu::atomic_change(address, [=](T old) { return old | value; });
}
template <std::integral T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return virtual_gpu::atomic_change(address, [=](T old) { return old & value; });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return virtual_gpu::atomic_change(address, [=](T) { return value; });
}
template <std::integral T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return virtual_gpu::atomic_change(address, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return virtual_gpu::atomic_change(address, [=](unsigned old) { return old >= last ? 0u : old + 1; });
}

// --- loads through the read-only cache: plain ones

template <class T>
T __ldg(const T* address) {
  return *address;
}

// --- arithmetic. The fast versions are the accurate ones here; glibc has functions of some of these names.

#define __expf(x) ::std::exp(static_cast<float>(x))
#define __exp10f(x) ::std::pow(10.0f, static_cast<float>(x))
#define __logf(x) ::std::log(static_cast<float>(x))
#define __log2f(x) ::std::log2(static_cast<float>(x))
#define __sinf(x) ::std::sin(static_cast<float>(x))
#define __cosf(x) ::std::cos(static_cast<float>(x))
#define __powf(x, y) ::std::pow(static_cast<float>(x), static_cast<float>(y))
#define __tanhf(x) ::std::tanh(static_cast<float>(x))

inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

// CUDA's global overloads: both sides become their common type first.
using std::max;
using std::min;
template <class A, class B>
requires(!std::is_same_v<A, B> && std::is_arithmetic_v<A> &&
         std::is_arithmetic_v<B>) constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return std::max(static_cast<T>(a), static_cast<T>(b));
}
template <class A, class B>
requires(!std::is_same_v<A, B> && std::is_arithmetic_v<A> &&
         std::is_arithmetic_v<B>) constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return std::min(static_cast<T>(a), static_cast<T>(b));
}
