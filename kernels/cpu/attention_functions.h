// What blocked attention does to one tile, in vector code chosen at run time: one table of functions per number type.
//
// Products are made of words. For f32, f16 (widened) and f64 a word is one value; for bf16 it is two neighbours along
// the contraction, which the processor multiplies and adds at once. A matrix that is contracted over its rows is packed
// by pairs of rows ("paired"), one that is contracted over its columns by pairs of columns: as it lies in memory, or
// transposed.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/number.h"

namespace distill {

// Which keys of a tile the queries of its rows see: row i sees column j when j ≤ diagonal + i and, with a window > 0,
// j > diagonal + i − window.
struct Band {
  std::int64_t diagonal = 0;
  std::int64_t window = 0;
  std::int64_t first(std::int64_t row) const {
    const std::int64_t from = diagonal + row - window + 1;
    return window > 0 && from > 0 ? from : 0;
  }
  std::int64_t last(std::int64_t row, std::int64_t width) const {
    const std::int64_t to = diagonal + row + 1;
    return to < 0 ? 0 : to < width ? to : width;
  }
};

template <class T>
struct AttentionFunctions {
  using C = Compute<T>;
  static constexpr std::int64_t values_per_word = std::is_same_v<T, bf16> ? 2 : 1;
  using Word = std::conditional_t<values_per_word == 2, std::uint32_t, C>;
  // Rows of words and of C are multiples of this: 64 bytes.
  static constexpr std::int64_t padding = 64 / std::int64_t(sizeof(C));

  // from [rows, d] to words. Rows of `to` are ld words; what is beyond the values is 0.
  void (*pack)(Word* to, std::int64_t ld, const T* from, std::int64_t stride, std::int64_t rows, std::int64_t d);
  // to [d/2, ld] or [d, ld], columns [0, padded rows)
  void (*pack_transposed)(Word* to, std::int64_t ld, const T* from, std::int64_t stride, std::int64_t rows,
                          std::int64_t d);
  // to [rows/2, ld] or [rows, ld]
  void (*pack_paired)(Word* to, std::int64_t ld, const T* from, std::int64_t stride, std::int64_t rows, std::int64_t d);

  // c [m, n] (+)= a b: a(i, p) = a[i·a_row + p·a_col], b [k, n]; m rows, k words, n a multiple of the padding.
  void (*product)(C* c, std::int64_t ldc, const Word* a, std::int64_t a_row, std::int64_t a_col, const Word* b,
                  std::int64_t ldb, std::int64_t m, std::int64_t n, std::int64_t k, bool accumulate);

  // Scores [rows, width] of a tile, width a multiple of the padding, to p = exp(scale · score − maximum), packed. The
  // maximum of each row grows; its sum and its row of `out` [rows, out_cols] follow.
  void (*softmax)(Word* p, std::int64_t p_ld, const C* scores, std::int64_t ld, std::int64_t rows, std::int64_t width,
                  Band band, C scale, C* maximum, C* sum, C* out, std::int64_t out_cols);

  // p = exp(scale · score − log_sum) and ds = scale · p (dp − delta), paired; ds also packed as it lies, where that is
  // not the same (two values per word). All [rows, ld].
  void (*softmax_backward)(Word* p_paired, Word* ds_paired, Word* ds, std::int64_t ds_ld, const C* scores, const C* dp,
                           std::int64_t ld, std::int64_t rows, std::int64_t width, Band band, C scale, const C* log_sum,
                           const C* delta);

  C (*dot)(const T* a, const T* b, std::int64_t n);
  void (*store)(T* to, const C* from, std::int64_t n, C factor);
};

template <class T>
AttentionFunctions<T> attention_functions();

}  // namespace distill
