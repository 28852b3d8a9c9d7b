// The row bodies of rows.h for one thread in vector code, as tables of functions: one table per number type, chosen at
// run time among the instruction sets of the machine. f64 (gradient checks) takes the plain bodies.
#pragma once

#include <cstdint>

#include "kernels/rows.h"

namespace distill {

template <class T>
struct RowFunctions {
  using C = Compute<T>;
  void (*rms_norm)(T* y, C* inv_rms, const T* x, const T* w, std::int64_t n, float eps);
  void (*add_rms_norm)(T* sum, T* y, C* inv_rms, const T* x, const T* delta, const T* w, std::int64_t n, float eps);
  void (*rms_norm_backward)(T* dx, C* dw, const T* dy, const T* dskip, const T* x, const T* w, C inv, std::int64_t n);
  void (*rope)(T* x, const C* table, std::int64_t heads, int head_dim, bool inverse);
  void (*swiglu)(T* y, const T* gate, const T* up, std::int64_t n);
  void (*swiglu_backward)(T* dgate, T* dup, const T* dy, const T* gate, const T* up, std::int64_t n);
  void (*add)(T* sum, const T* a, const T* b, std::int64_t n);
  void (*widen)(C* to, const T* from, std::int64_t n);
  void (*narrow)(T* to, const C* from, std::int64_t n);
  void (*accumulate)(C* sum, const T* x, std::int64_t n);
  void (*accumulate_double)(double* sum, const T* x, std::int64_t n);
  double (*sum_of_squares)(const T* x, std::int64_t n);
  void (*adamw)(T* narrow, C* weight, C* m, C* v, const C* grad, std::int64_t n, const AdamWFactors<C>& factors);
};

template <class T>
RowFunctions<T> row_functions();

// A plain body for one thread.
template <auto Body>
struct AsLone;
template <class R, class... P, R (*Body)(Lone, P...)>
struct AsLone<Body> {
  static R call(P... p) { return Body(Lone{}, p...); }
};

template <class T>
RowFunctions<T> plain_row_functions() {
  using C = Compute<T>;
  return {AsLone<&rms_norm_row<Lone, T>>::call,
          AsLone<&add_rms_norm_row<Lone, T>>::call,
          AsLone<&rms_norm_backward_row<Lone, T>>::call,
          AsLone<&rope_row<Lone, T>>::call,
          AsLone<&swiglu_row<Lone, T>>::call,
          AsLone<&swiglu_backward_row<Lone, T>>::call,
          AsLone<&add_row<Lone, T>>::call,
          AsLone<&cast_row<Lone, C, T>>::call,
          AsLone<&cast_row<Lone, T, C>>::call,
          AsLone<&accumulate_row<Lone, C, T>>::call,
          AsLone<&accumulate_row<Lone, double, T>>::call,
          AsLone<&sum_of_squares_row<Lone, T>>::call,
          AsLone<&adamw_row<Lone, T, C>>::call};
}

// The plain bodies of what follows, where the machine has no vectors.
inline void plain_transpose(std::uint16_t* to, std::int64_t to_stride, const std::uint16_t* from,
                            std::int64_t from_stride, std::int64_t rows, std::int64_t cols) {
  for (std::int64_t c = 0; c < cols; ++c)
    for (std::int64_t r = 0; r < rows; ++r) to[c * to_stride + r] = from[r * from_stride + c];
}

// to [cols, rows] = from [rows, cols], 16-bit elements.
using Transpose16Bit = void (*)(std::uint16_t* to, std::int64_t to_stride, const std::uint16_t* from,
                                std::int64_t from_stride, std::int64_t rows, std::int64_t cols);
Transpose16Bit transpose_16_bit();

}  // namespace distill
