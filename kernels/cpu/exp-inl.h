// exp and log of a vector of floats, for sums over the vocabulary: about half the work of hwy/contrib/math.
// Included once per instruction set (the guard toggles as in Highway's own -inl.h files).
#if defined(DISTILL_KERNELS_CPU_EXP_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef DISTILL_KERNELS_CPU_EXP_INL_H
#undef DISTILL_KERNELS_CPU_EXP_INL_H
#else
#define DISTILL_KERNELS_CPU_EXP_INL_H
#endif

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace distill {
namespace HWY_NAMESPACE {

// eˣ for x ≤ 88; vanishes below −87 (at the latest at −110); NaN stays. Within 2 ulp above −20, 6 ulp at the underflow
// end (ln 2 is one float there).
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> fast_exp(D d, hwy::HWY_NAMESPACE::Vec<D> x) {
  namespace hn = hwy::HWY_NAMESPACE;
  constexpr bool has_scale = HWY_TARGET == HWY_AVX3 && hn::MaxLanes(D()) == 16;  // an instruction for y·2ⁿ
  if constexpr (has_scale) x = hn::Max(hn::Set(d, -110.0f), x);                  // in this order NaN stays
  // n = round(x / ln 2) sits in the low bits of x / ln 2 + 1.5·2²³.
  const auto shifter = hn::Set(d, 12582912.0f);
  const auto shifted = hn::MulAdd(x, hn::Set(d, 1.44269504f), shifter);
  const auto n = hn::Sub(shifted, shifter);
#if !HWY_NATIVE_FMA  // multiply and add round twice: ln 2 in two parts
  auto f = hn::Sub(x, hn::Mul(n, hn::Set(d, 0.693359375f)));
  f = hn::Add(f, hn::Mul(n, hn::Set(d, 2.12194440e-4f)));
#else
  const auto f = hn::NegMulAdd(n, hn::Set(d, 0.693147181f), x);  // |f| ≤ ln 2 / 2
#endif
  auto y = hn::Set(d, 0.00138145988f);  // minimax, relative error 3e-9
  y = hn::MulAdd(y, f, hn::Set(d, 0.00836871658f));
  y = hn::MulAdd(y, f, hn::Set(d, 0.0416683890f));
  y = hn::MulAdd(y, f, hn::Set(d, 0.166665211f));
  y = hn::MulAdd(y, f, hn::Set(d, 0.49999994f));
  y = hn::MulAdd(y, f, hn::Set(d, 1.0f));
  y = hn::MulAdd(y, f, hn::Set(d, 1.0f));
#if HWY_TARGET == HWY_AVX3
  if constexpr (has_scale) return hn::Vec<D>{_mm512_scalef_ps(y.raw, n.raw)};
#endif
  const hn::RebindToSigned<D> di;
  const auto scaled = hn::BitCast(d, hn::Add(hn::BitCast(di, y), hn::ShiftLeft<23>(hn::BitCast(di, shifted))));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -87.0f)), scaled);
}

// ln x for positive normal x, within 2 ulp; exactly 0 for 1.
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> fast_log(D d, hwy::HWY_NAMESPACE::Vec<D> x) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::RebindToSigned<D> di;
  // x = 2ᵏ (1 + f), 1 + f in [√½, √2)
  const auto bits = hn::BitCast(di, x);
  const auto k = hn::ShiftRight<23>(hn::Sub(bits, hn::Set(di, 0x3f3504f3)));
  const auto f = hn::Sub(hn::BitCast(d, hn::Sub(bits, hn::ShiftLeft<23>(k))), hn::Set(d, 1.0f));
  auto y = hn::Set(d, 0.0870043710f);  // minimax, relative error of the logarithm 3e-8
  y = hn::MulAdd(y, f, hn::Set(d, -0.142674908f));
  y = hn::MulAdd(y, f, hn::Set(d, 0.149147689f));
  y = hn::MulAdd(y, f, hn::Set(d, -0.16577585f));
  y = hn::MulAdd(y, f, hn::Set(d, 0.199630633f));
  y = hn::MulAdd(y, f, hn::Set(d, -0.250013381f));
  y = hn::MulAdd(y, f, hn::Set(d, 0.333339095f));
  y = hn::MulAdd(y, f, hn::Set(d, -0.5f));
  y = hn::MulAdd(y, hn::Mul(f, f), f);
  return hn::MulAdd(hn::ConvertTo(d, k), hn::Set(d, 0.693147181f), y);
}

}  // namespace HWY_NAMESPACE
}  // namespace distill
HWY_AFTER_NAMESPACE();

#endif
