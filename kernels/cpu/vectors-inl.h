// Loads and stores of any number type as vectors of what is calculated in, and loops over rows of any length.
// Included once per instruction set (the guard toggles as in Highway's own -inl.h files).
#if defined(DISTILL_KERNELS_CPU_VECTORS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef DISTILL_KERNELS_CPU_VECTORS_INL_H
#undef DISTILL_KERNELS_CPU_VECTORS_INL_H
#else
#define DISTILL_KERNELS_CPU_VECTORS_INL_H
#endif

#include <cstdint>
#include <cstring>

#include "core/number.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/cpu/exp-inl.h"

HWY_BEFORE_NAMESPACE();
namespace distill {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

template <class T>
using TagOf = hn::ScalableTag<Compute<T>>;
template <class T>
using VectorOf = hn::Vec<TagOf<T>>;
template <class C>
inline constexpr std::int64_t lanes_of = std::int64_t(hn::MaxLanes(hn::ScalableTag<C>()));  // fixed-size vectors

HWY_INLINE VectorOf<float> load(const float* p) { return hn::LoadU(TagOf<float>(), p); }
HWY_INLINE VectorOf<double> load(const double* p) { return hn::LoadU(TagOf<double>(), p); }
HWY_INLINE VectorOf<float> load(const bf16* p) {
  const hn::Rebind<hwy::bfloat16_t, TagOf<float>> half;
  return hn::PromoteTo(TagOf<float>(), hn::LoadU(half, reinterpret_cast<const hwy::bfloat16_t*>(p)));
}
HWY_INLINE VectorOf<float> load(const f16* p) {
  const hn::Rebind<hwy::float16_t, TagOf<float>> half;
  return hn::PromoteTo(TagOf<float>(), hn::LoadU(half, reinterpret_cast<const hwy::float16_t*>(p)));
}

// The upper half of each float after rounding to nearest even, in the low 16 bits; NaN stays NaN (core/number.h).
HWY_INLINE hn::Vec<hn::ScalableTag<std::uint32_t>> rounded_halves(VectorOf<float> x) {
  const hn::ScalableTag<std::uint32_t> d;
  const auto bits = hn::BitCast(d, x), upper = hn::ShiftRight<16>(bits);
  const auto rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(d, 0x7fffu)), hn::And(upper, hn::Set(d, 1u))));
  return hn::IfThenElse(hn::RebindMask(d, hn::IsNaN(x)), hn::Or(upper, hn::Set(d, 0x40u)), rounded);
}

HWY_INLINE void store(float* p, VectorOf<float> x) { hn::StoreU(x, TagOf<float>(), p); }
HWY_INLINE void store(double* p, VectorOf<double> x) { hn::StoreU(x, TagOf<double>(), p); }
HWY_INLINE void store(bf16* p, VectorOf<float> x) {
  const hn::Rebind<std::uint16_t, hn::ScalableTag<std::uint32_t>> half;
  hn::StoreU(hn::TruncateTo(half, rounded_halves(x)), half, reinterpret_cast<std::uint16_t*>(p));
}
HWY_INLINE void store(f16* p, VectorOf<float> x) {
#if HWY_TARGET == HWY_SCALAR  // where Highway cuts subnormal results instead of rounding them
  *p = f16(hn::GetLane(x));
#else
  const hn::Rebind<hwy::float16_t, TagOf<float>> half;
  hn::StoreU(hn::DemoteTo(half, x), half, reinterpret_cast<hwy::float16_t*>(p));
#endif
}

// x as memory of type T would keep it.
template <class T>
HWY_INLINE VectorOf<T> rounded(VectorOf<T> x) {
  if constexpr (sizeof(T) == 2) {
    T memory[lanes_of<Compute<T>>];
    store(memory, x);
    return load(memory);
  } else {
    return x;
  }
}
template <>
HWY_INLINE VectorOf<bf16> rounded<bf16>(VectorOf<bf16> x) {
  return hn::BitCast(TagOf<float>(), hn::ShiftLeft<16>(rounded_halves(x)));
}

// How a loop touches memory: a whole vector, or its first n lanes, the others being 0 when read and not written.
struct Whole {
  template <class T>
  HWY_INLINE VectorOf<T> load(const T* p) const {
    return HWY_NAMESPACE::load(p);
  }
  template <class T>
  HWY_INLINE void store(T* p, VectorOf<T> x) const {
    HWY_NAMESPACE::store(p, x);
  }
};
struct Part {
  std::size_t n;
  template <class T>
  HWY_INLINE VectorOf<T> load(const T* p) const {
    alignas(64) T memory[lanes_of<Compute<T>>] = {};
    std::memcpy(memory, p, n * sizeof(T));
    return HWY_NAMESPACE::load(memory);
  }
  template <class T>
  HWY_INLINE void store(T* p, VectorOf<T> x) const {
    alignas(64) T memory[lanes_of<Compute<T>>];
    HWY_NAMESPACE::store(memory, x);
    std::memcpy(p, memory, n * sizeof(T));
  }
};

#define DISTILL_ALWAYS_INLINE __attribute__((always_inline))

// body(i, access) for each vector of n elements of C.
template <class C, class Body>
HWY_INLINE void for_vectors(std::int64_t n, Body body) {
  std::int64_t i = 0;
  for (; i + lanes_of<C> <= n; i += lanes_of<C>) body(i, Whole{});
  if (i < n) body(i, Part{std::size_t(n - i)});
}

HWY_INLINE VectorOf<float> exp_of(VectorOf<float> x) { return fast_exp(TagOf<float>(), x); }
HWY_INLINE VectorOf<double> exp_of(VectorOf<double> x) { return hn::Exp(TagOf<double>(), x); }

}  // namespace HWY_NAMESPACE
}  // namespace distill
HWY_AFTER_NAMESPACE();

#endif
