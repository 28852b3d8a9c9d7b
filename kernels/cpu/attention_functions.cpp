#include "kernels/cpu/attention_functions.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels/cpu/targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_functions.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
//
#include "kernels/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace distill {
namespace HWY_NAMESPACE {
namespace {

template <class T>
using WordOf = typename AttentionFunctions<T>::Word;

// --- packing

// Values 2i and 2i + 1 of a row of d as one word; beyond d they are 0.
HWY_INLINE std::uint32_t pair_of(const bf16* row, std::int64_t i, std::int64_t d) {
  return std::uint32_t{row[2 * i].bits} | (2 * i + 1 < d ? std::uint32_t{row[2 * i + 1].bits} << 16 : 0);
}

template <class T>
void pack(WordOf<T>* to, std::int64_t ld, const T* from, std::int64_t stride, std::int64_t rows, std::int64_t d) {
  for (std::int64_t r = 0; r < rows; ++r, to += ld, from += stride) {
    if constexpr (std::is_same_v<T, bf16>) {
      std::memcpy(to, from, std::size_t(d) * sizeof(bf16));
      std::fill(reinterpret_cast<bf16*>(to) + d, reinterpret_cast<bf16*>(to + ld), bf16(0.0f));
    } else {
      for_vectors<Compute<T>>(
          d, [=](std::int64_t i, auto at) DISTILL_ALWAYS_INLINE { at.store(to + i, at.load(from + i)); });
      std::fill(to + d, to + ld, WordOf<T>(0));
    }
  }
}

template <class T>
void pack_transposed(WordOf<T>* to, std::int64_t ld, const T* from, std::int64_t stride, std::int64_t rows,
                     std::int64_t d) {
  constexpr std::int64_t block = AttentionFunctions<T>::padding;
  const std::int64_t words = (d + AttentionFunctions<T>::values_per_word - 1) / AttentionFunctions<T>::values_per_word;
  for (std::int64_t first = 0; first < rows; first += block) {
    const std::int64_t count = std::min(block, rows - first);
    for (std::int64_t w = 0; w < words; ++w) {
      WordOf<T>* line = to + w * ld + first;
      for (std::int64_t r = 0; r < count; ++r) {
        const T* row = from + (first + r) * stride;
        if constexpr (std::is_same_v<T, bf16>)
          line[r] = pair_of(row, w, d);
        else
          line[r] = Compute<T>(row[w]);
      }
      std::fill(line + count, line + block, WordOf<T>(0));
    }
  }
}

template <class T>
void pack_paired(WordOf<T>* to, std::int64_t ld, const T* from, std::int64_t stride, std::int64_t rows,
                 std::int64_t d) {
  if constexpr (std::is_same_v<T, bf16>) {
    for (std::int64_t r = 0; r < rows; r += 2, to += ld) {
      const bf16 *first = from + r * stride, *second = first + stride;
      const bool whole = r + 1 < rows;
      for (std::int64_t i = 0; i < d; ++i)
        to[i] = std::uint32_t{first[i].bits} | (whole ? std::uint32_t{second[i].bits} << 16 : 0);
      std::fill(to + d, to + ld, 0u);
    }
  } else {
    pack<T>(to, ld, from, stride, rows, d);
  }
}

// --- rows

template <class T>
Compute<T> dot(const T* a, const T* b, std::int64_t n) {
  VectorOf<T> sum = hn::Zero(TagOf<T>());
  for_vectors<Compute<T>>(
      n, [&](std::int64_t i, auto at) DISTILL_ALWAYS_INLINE { sum = hn::MulAdd(at.load(a + i), at.load(b + i), sum); });
  return hn::GetLane(hn::SumOfLanes(TagOf<T>(), sum));
}

template <class T>
void store_scaled(T* to, const Compute<T>* from, std::int64_t n, Compute<T> factor) {
  const VectorOf<T> scale = hn::Set(TagOf<T>(), factor);
  for_vectors<Compute<T>>(
      n, [=](std::int64_t i, auto at) DISTILL_ALWAYS_INLINE { at.store(to + i, hn::Mul(at.load(from + i), scale)); });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace distill

#undef DISTILL_BF16_DOT
#define DISTILL_BF16_DOT 0
#include "kernels/cpu/attention_functions.inc"
HWY_AFTER_NAMESPACE();

#if HWY_TARGET == HWY_AVX3
HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512bf16")
#undef DISTILL_BF16_DOT
#define DISTILL_BF16_DOT 1
#include "kernels/cpu/attention_functions.inc"
HWY_POP_ATTRIBUTES
#endif

namespace distill {
namespace HWY_NAMESPACE {
namespace {

template <class T>
AttentionFunctions<T> attention_table() {
  return {pack<T>,
          pack_transposed<T>,
          pack_paired<T>,
          portable::product<T>,
          portable::softmax<T>,
          portable::softmax_backward<T>,
          dot<T>,
          store_scaled<T>};
}
AttentionFunctions<float> attention_f32() { return attention_table<float>(); }
AttentionFunctions<double> attention_f64() { return attention_table<double>(); }
AttentionFunctions<f16> attention_f16() { return attention_table<f16>(); }
AttentionFunctions<bf16> attention_bf16() {
  AttentionFunctions<bf16> table = attention_table<bf16>();
#if HWY_TARGET == HWY_AVX3
  if (__builtin_cpu_supports("avx512bf16")) {
    table.product = bf16_dot::product<bf16>;
    table.softmax = bf16_dot::softmax<bf16>;
    table.softmax_backward = bf16_dot::softmax_backward<bf16>;
  }
#endif
  return table;
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace distill

#if HWY_ONCE
namespace distill {

HWY_EXPORT(attention_f32);
HWY_EXPORT(attention_f64);
HWY_EXPORT(attention_f16);
HWY_EXPORT(attention_bf16);

template <>
AttentionFunctions<float> attention_functions<float>() {
  return HWY_DYNAMIC_DISPATCH(attention_f32)();
}
template <>
AttentionFunctions<double> attention_functions<double>() {
  return HWY_DYNAMIC_DISPATCH(attention_f64)();
}
template <>
AttentionFunctions<f16> attention_functions<f16>() {
  return HWY_DYNAMIC_DISPATCH(attention_f16)();
}
template <>
AttentionFunctions<bf16> attention_functions<bf16>() {
  return HWY_DYNAMIC_DISPATCH(attention_bf16)();
}

}  // namespace distill
#endif
