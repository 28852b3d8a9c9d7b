#include "kernels/cpu/row_functions.h"

#include <algorithm>

#include "kernels/cpu/targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/row_functions.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
//
#include "kernels/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace distill {
namespace HWY_NAMESPACE {
namespace {

#if HWY_TARGET == HWY_SCALAR
template <class T>
RowFunctions<T> rows() {
  return plain_row_functions<T>();
}
constexpr Transpose16Bit transpose = plain_transpose;
#else

HWY_INLINE float sum_of(VectorOf<float> x) { return hn::GetLane(hn::SumOfLanes(TagOf<float>(), x)); }

// The definitions are those of kernels/rows.h.
template <class T>
struct Rows {
  using C = Compute<T>;
  using V = VectorOf<T>;
  static constexpr TagOf<T> d{};

  static C inverse_rms(V squares, std::int64_t n, float eps) { return 1 / std::sqrt(sum_of(squares) / C(n) + C(eps)); }

  static void normalise(T* y, const T* x, const T* w, C inv_rms, std::int64_t n) {
    const V inv = hn::Set(d, inv_rms);
    for_vectors<C>(n, [=](std::int64_t i, auto at) DISTILL_ALWAYS_INLINE {
      at.store(y + i, hn::Mul(rounded<T>(hn::Mul(at.load(x + i), inv)), at.load(w + i)));
    });
  }

  static void rms_norm(T* y, C* inv_rms, const T* x, const T* w, std::int64_t n, float eps) {
    V squares = hn::Zero(d);
    for_vectors<C>(n, [&](std::int64_t i, auto at) DISTILL_ALWAYS_INLINE {
      const V a = at.load(x + i);
      squares = hn::MulAdd(a, a, squares);
    });
    *inv_rms = inverse_rms(squares, n, eps);
    normalise(y, x, w, *inv_rms, n);
  }

  static void add_rms_norm(T* sum, T* y, C* inv_rms, const T* x, const T* delta, const T* w, std::int64_t n,
                           float eps) {
    V squares = hn::Zero(d);
    for_vectors<C>(n, [&](std::int64_t i, auto at) DISTILL_ALWAYS_INLINE {
      const V a = rounded<T>(hn::Add(at.load(x + i), at.load(delta + i)));
      at.store(sum + i, a);
      squares = hn::MulAdd(a, a, squares);
    });
    *inv_rms = inverse_rms(squares, n, eps);
    normalise(y, sum, w, *inv_rms, n);
  }

  static void rms_norm_backward(T* dx, C* dw, const T* dy, const T* dskip, const T* x, const T* w, C inv_rms,
                                std::int64_t n) {
    V dot = hn::Zero(d);
    for_vectors<C>(n, [&](std::int64_t i, auto at) DISTILL_ALWAYS_INLINE {
      dot = hn::MulAdd(hn::Mul(at.load(dy + i), at.load(w + i)), at.load(x + i), dot);
    });
    const V along = hn::Set(d, sum_of(dot) * inv_rms * inv_rms / C(n)), inv = hn::Set(d, inv_rms);
    for_vectors<C>(n, [=](std::int64_t i, auto at) DISTILL_ALWAYS_INLINE {
      const V dyi = at.load(dy + i), xi = at.load(x + i);
      V value = hn::Mul(inv, hn::Sub(hn::Mul(dyi, at.load(w + i)), hn::Mul(xi, along)));
      if (dskip) value = hn::Add(value, at.load(dskip + i));
      at.store(dw + i, hn::MulAdd(hn::Mul(dyi, xi), inv, at.load(dw + i)));
      at.store(dx + i, value);
    });
  }

  static void rope(T* x, const C* table, std::int64_t heads, int head_dim, bool inverse) {
    const std::int64_t half = head_dim / 2;
    const V sign = hn::Set(d, inverse ? C(-1) : C(1));
    for (std::int64_t head = 0; head < heads; ++head) {
      T *first = x + head * head_dim, *second = first + half;
      for_vectors<C>(half, [=](std::int64_t i, auto at) DISTILL_ALWAYS_INLINE {
        const V a = at.load(first + i), b = at.load(second + i), cosine = at.load(table + i),
                sine = hn::Mul(sign, at.load(table + half + i));
        at.store(first + i, hn::NegMulAdd(b, sine, hn::Mul(a, cosine)));
        at.store(second + i, hn::MulAdd(a, sine, hn::Mul(b, cosine)));
      });
    }
  }

  // 1/(1 + e^−g); below −87 the smallest normal numbers instead of zero. NaN is lost: all users multiply by g.
  static HWY_INLINE V sigmoid(V g) {
    const V one = hn::Set(d, C(1));
    return hn::Div(one, hn::Add(one, exp_of(hn::Min(hn::Neg(g), hn::Set(d, C(87))))));
  }

  static void swiglu(T* y, const T* gate, const T* up, std::int64_t n) {
    for_vectors<C>(n, [=](std::int64_t i, auto at) DISTILL_ALWAYS_INLINE {
      const V g = at.load(gate + i);
      at.store(y + i, hn::Mul(hn::Mul(g, sigmoid(g)), at.load(up + i)));
    });
  }

  static void swiglu_backward(T* dgate, T* dup, const T* dy, const T* gate, const T* up, std::int64_t n) {
    for_vectors<C>(n, [=](std::int64_t i, auto at) DISTILL_ALWAYS_INLINE {
      const V g = at.load(gate + i), u = at.load(up + i), s = sigmoid(g), ds = hn::Mul(at.load(dy + i), s);
      const V gs = hn::NegMulAdd(g, s, g);  // g (1 − s)
      at.store(dgate + i, hn::Mul(u, hn::MulAdd(ds, gs, ds)));
      at.store(dup + i, hn::Mul(ds, g));
    });
  }

  static void add(T* sum, const T* a, const T* b, std::int64_t n) {
    for_vectors<C>(n, [=](std::int64_t i, auto at)
                          DISTILL_ALWAYS_INLINE { at.store(sum + i, hn::Add(at.load(a + i), at.load(b + i))); });
  }

  static void widen(C* to, const T* from, std::int64_t n) {
    for_vectors<C>(n, [=](std::int64_t i, auto at) DISTILL_ALWAYS_INLINE { at.store(to + i, at.load(from + i)); });
  }

  static void narrow(T* to, const C* from, std::int64_t n) {
    for_vectors<C>(n, [=](std::int64_t i, auto at) DISTILL_ALWAYS_INLINE { at.store(to + i, at.load(from + i)); });
  }

  static void accumulate(C* sum, const T* x, std::int64_t n) {
    for_vectors<C>(n, [=](std::int64_t i, auto at)
                          DISTILL_ALWAYS_INLINE { at.store(sum + i, hn::Add(at.load(sum + i), at.load(x + i))); });
  }

  // The lower and upper half of a vector of floats as doubles.
  static constexpr std::int64_t half_lanes = std::max<std::int64_t>(1, lanes_of<float> / 2);
  using Wide = hn::Vec<TagOf<double> >;
  static HWY_INLINE Wide wide_lower(VectorOf<float> x) {
    const hn::Rebind<float, TagOf<double> > half;
    return hn::PromoteTo(TagOf<double>(), hn::LowerHalf(half, x));
  }
  static HWY_INLINE Wide wide_upper(VectorOf<float> x) {
    const hn::Rebind<float, TagOf<double> > half;
    return hn::PromoteTo(TagOf<double>(), hn::UpperHalf(half, x));
  }

  static void accumulate_double(double* sum, const T* x, std::int64_t n) {
    std::int64_t i = 0;
    for (; i + lanes_of<float> <= n; i += lanes_of<float>) {
      const V a = load(x + i);
      store(sum + i, hn::Add(load(sum + i), wide_lower(a)));
      store(sum + i + half_lanes, hn::Add(load(sum + i + half_lanes), wide_upper(a)));
    }
    accumulate_row(Lone{}, sum + i, x + i, n - i);
  }

  static double sum_of_squares(const T* x, std::int64_t n) {
    Wide lower = hn::Zero(TagOf<double>()), upper = lower;
    std::int64_t i = 0;
    for (; i + lanes_of<float> <= n; i += lanes_of<float>) {
      const V a = load(x + i);
      const Wide p = wide_lower(a), q = wide_upper(a);
      lower = hn::MulAdd(p, p, lower);
      upper = hn::MulAdd(q, q, upper);
    }
    const double sum = hn::GetLane(hn::SumOfLanes(TagOf<double>(), hn::Add(lower, upper)));
    return sum + sum_of_squares_row(Lone{}, x + i, n - i);
  }

  static void adamw(T* narrow_copy, C* weight, C* m, C* v, const C* grad, std::int64_t n, const AdamWFactors<C>& f) {
    for_vectors<C>(n, [=](std::int64_t i, auto at) DISTILL_ALWAYS_INLINE {
      const V g = hn::Mul(at.load(grad + i), hn::Set(d, f.grad_scale)), old_m = at.load(m + i);
      const V new_m = hn::MulAdd(hn::Set(d, f.one_minus_beta1), hn::Sub(g, old_m), old_m);
      const V new_v =
          hn::MulAdd(hn::Mul(hn::Set(d, f.one_minus_beta2), g), g, hn::Mul(at.load(v + i), hn::Set(d, f.beta2)));
      const V denominator = hn::MulAdd(hn::Sqrt(new_v), hn::Set(d, f.inv_root), hn::Set(d, f.epsilon));
      const V step = hn::Div(hn::Mul(hn::Set(d, f.rate), new_m), denominator);
      const V w = hn::MulSub(at.load(weight + i), hn::Set(d, f.keep), step);
      at.store(m + i, new_m);
      at.store(v + i, new_v);
      at.store(weight + i, w);
      if (narrow_copy) at.store(narrow_copy + i, w);
    });
  }

  static RowFunctions<T> table() {
    return {rms_norm, add_rms_norm, rms_norm_backward, rope,           swiglu, swiglu_backward, add, widen,
            narrow,   accumulate,   accumulate_double, sum_of_squares, adamw};
  }
};

template <class T>
RowFunctions<T> rows() {
  return Rows<T>::table();
}

// 8 × 8 elements in registers: three rounds of interleaving.
HWY_INLINE void transpose_block(std::uint16_t* to, std::int64_t to_stride, const std::uint16_t* from,
                                std::int64_t from_stride) {
  const hn::FixedTag<std::uint16_t, 8> d;
  const hn::FixedTag<std::uint32_t, 4> d32;
  const hn::FixedTag<std::uint64_t, 2> d64;
  hn::Vec<decltype(d)> row[8], pair[8], four[8];
  for (int i = 0; i < 8; ++i) row[i] = hn::LoadU(d, from + i * from_stride);
  for (int i = 0; i < 4; ++i) {
    pair[i] = hn::InterleaveLower(d, row[2 * i], row[2 * i + 1]);
    pair[i + 4] = hn::InterleaveUpper(d, row[2 * i], row[2 * i + 1]);
  }
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 2; ++i) {
      const auto a = hn::BitCast(d32, pair[4 * half + 2 * i]), b = hn::BitCast(d32, pair[4 * half + 2 * i + 1]);
      four[4 * half + i] = hn::BitCast(d, hn::InterleaveLower(d32, a, b));
      four[4 * half + 2 + i] = hn::BitCast(d, hn::InterleaveUpper(d32, a, b));
    }
  for (int i = 0; i < 4; ++i) {
    const auto a = hn::BitCast(d64, four[2 * i]), b = hn::BitCast(d64, four[2 * i + 1]);
    hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, a, b)), d, to + 2 * i * to_stride);
    hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, a, b)), d, to + (2 * i + 1) * to_stride);
  }
}

void transpose(std::uint16_t* to, std::int64_t to_stride, const std::uint16_t* from, std::int64_t from_stride,
               std::int64_t rows, std::int64_t cols) {
  // 32 rows at a time fill whole lines of `to`.
  constexpr std::int64_t tall = 32;
  const auto plain = [=](std::int64_t r0, std::int64_t r1, std::int64_t c0, std::int64_t c1) {
    plain_transpose(to + c0 * to_stride + r0, to_stride, from + r0 * from_stride + c0, from_stride, r1 - r0, c1 - c0);
  };
  const std::int64_t whole_cols = cols / 8 * 8;
  for (std::int64_t first = 0; first < rows; first += tall) {
    const std::int64_t last = std::min(rows, first + tall), whole = first + (last - first) / 8 * 8;
    for (std::int64_t c = 0; c < whole_cols; c += 8)
      for (std::int64_t r = first; r < whole; r += 8)
        transpose_block(to + c * to_stride + r, to_stride, from + r * from_stride + c, from_stride);
    plain(whole, last, 0, whole_cols);
    plain(first, last, whole_cols, cols);
  }
}

#endif  // HWY_TARGET == HWY_SCALAR

RowFunctions<float> rows_f32() { return rows<float>(); }
RowFunctions<bf16> rows_bf16() { return rows<bf16>(); }
RowFunctions<f16> rows_f16() { return rows<f16>(); }
Transpose16Bit transpose_function() { return transpose; }

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace distill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace distill {

HWY_EXPORT(rows_f32);
HWY_EXPORT(rows_bf16);
HWY_EXPORT(rows_f16);
HWY_EXPORT(transpose_function);

template <>
RowFunctions<float> row_functions<float>() {
  return HWY_DYNAMIC_DISPATCH(rows_f32)();
}
template <>
RowFunctions<bf16> row_functions<bf16>() {
  return HWY_DYNAMIC_DISPATCH(rows_bf16)();
}
template <>
RowFunctions<f16> row_functions<f16>() {
  return HWY_DYNAMIC_DISPATCH(rows_f16)();
}
Transpose16Bit transpose_16_bit() {
  return HWY_DYNAMIC_DISPATCH(transpose_function)();
}

template <>
RowFunctions<double> row_functions<double>() {
  return plain_row_functions<double>();
}

}  // namespace distill
#endif
