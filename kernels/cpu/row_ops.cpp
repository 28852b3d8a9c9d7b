// Operations that treat rows (or elements) on their own: which thread takes what. The maths is in row_functions.h.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/random.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/cpu/row_functions.h"

namespace distill {

namespace {

// Fewer elements than this are not worth waking threads.
constexpr std::int64_t least_parallel = 1 << 13;

template <class T>
T* row_of(const View& v, std::int64_t r) {
  return v.as<T>() + r * v.stride;
}
template <class T>
const T* row_of(const ConstView& v, std::int64_t r) {
  return v.as<T>() + r * v.stride;
}
void* bytes_of(const View& v, std::int64_t r) {
  return static_cast<char*>(v.mutable_data()) + r * v.stride * std::int64_t(size_of(v.dtype));
}
const void* bytes_of(const ConstView& v, std::int64_t r) {
  return static_cast<const char*>(v.data) + r * v.stride * std::int64_t(size_of(v.dtype));
}

// body(row) on `threads` threads.
template <class Body>
void for_rows(int threads, const ConstView& v, Body body) {
#pragma omp parallel for num_threads(threads) schedule(static) if (v.size() > least_parallel)
  for (std::int64_t r = 0; r < v.rows; ++r) body(r);
}

// body(row, first column, columns): all elements of equally shaped views in spans of at most 16384. Contiguous views
// count as one row.
constexpr std::int64_t span = 1 << 14;
template <class Body, class... Views>
void for_spans(int threads, Body body, const ConstView& v, const Views&... others) {
  const bool flat = v.contiguous() && (others.contiguous() && ...);
  const std::int64_t rows = flat ? 1 : v.rows, cols = flat ? v.size() : v.cols, spans = (cols + span - 1) / span;
#pragma omp parallel for num_threads(threads) schedule(static) if (v.size() > least_parallel)
  for (std::int64_t i = 0; i < rows * spans; ++i) {
    const std::int64_t first = i % spans * span;
    body(i / spans, first, std::min(span, cols - first));
  }
}

}  // namespace

void CpuDevice::do_zero(View x) {
  const std::size_t width = size_of(x.dtype);
  for_spans(
      threads_,
      [=](std::int64_t r, std::int64_t first, std::int64_t n) {
        std::memset(static_cast<char*>(bytes_of(x, r)) + std::size_t(first) * width, 0, std::size_t(n) * width);
      },
      x);
}

namespace {

template <class To, class From>
void cast_span(To* to, const From* from, std::int64_t n) {
  if constexpr (std::is_same_v<To, From>)
    std::memmove(to, from, std::size_t(n) * sizeof(To));
  else if constexpr (std::is_same_v<To, float> && sizeof(From) == 2)
    row_functions<From>().widen(to, from, n);
  else if constexpr (std::is_same_v<From, float> && sizeof(To) == 2)
    row_functions<To>().narrow(to, from, n);
  else
    cast_row(Lone{}, to, from, n);
}

}  // namespace

void CpuDevice::do_cast(View to, const ConstView& from) {
  with_float_type(to.dtype, [&](auto t) {
    with_float_type(from.dtype, [&](auto f) {
      for_spans(
          threads_,
          [=](std::int64_t r, std::int64_t first, std::int64_t n) {
            cast_span(row_of<decltype(t)>(to, r) + first, row_of<decltype(f)>(from, r) + first, n);
          },
          to, from);
    });
  });
}

void CpuDevice::do_add(View sum, const ConstView& a, const ConstView& b) {
  with_float_type(sum.dtype, [&](auto t) {
    using T = decltype(t);
    const auto& functions = row_functions<T>();
    for_spans(
        threads_,
        [=, &functions](std::int64_t r, std::int64_t first, std::int64_t n) {
          functions.add(row_of<T>(sum, r) + first, row_of<T>(a, r) + first, row_of<T>(b, r) + first, n);
        },
        sum, a, b);
  });
}

void CpuDevice::do_add_bias(View x, const ConstView& bias) {
  with_float_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    const auto& functions = row_functions<T>();
    for_rows(threads_, x, [=, &functions](std::int64_t r) {
      functions.add(row_of<T>(x, r), row_of<T>(x, r), bias.as<T>(), x.cols);
    });
  });
}

void CpuDevice::do_gather_rows(View out, const ConstView& x, const ConstView& rows) {
  const std::size_t width = std::size_t(out.cols) * size_of(out.dtype);
  const std::int32_t* from = rows.as<std::int32_t>();
  for_rows(threads_, out, [=](std::int64_t r) { std::memcpy(bytes_of(out, r), bytes_of(x, from[r]), width); });
}

void CpuDevice::do_scatter_rows(View out, const ConstView& x, const ConstView& rows) {
  const std::size_t width = std::size_t(out.cols) * size_of(out.dtype);
  const std::int32_t* to = rows.as<std::int32_t>();
  for_rows(threads_, x, [=](std::int64_t r) { std::memcpy(bytes_of(out, to[r]), bytes_of(x, r), width); });
}

void CpuDevice::do_fill_normal(View x, std::uint64_t seed, std::uint64_t tensor, std::int64_t first, float std) {
  const std::uint64_t key = random_key(seed, tensor);
  with_float_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    for_spans(
        threads_,
        [=](std::int64_t r, std::int64_t column, std::int64_t n) {
          T* to = row_of<T>(x, r) + column;
          const std::uint64_t index = std::uint64_t(first + r * x.cols + column);
          const auto put = [&](std::int64_t i, double value) { to[i] = T(Compute<T>(double(std) * value)); };
          std::int64_t i = 0;
          if (index % 2 == 1 && n > 0) put(i++, normal_value(key, index));
          for (; i + 2 <= n; i += 2) {
            const NormalPair pair = normal_pair(key, (index + std::uint64_t(i)) / 2);
            put(i, pair.even);
            put(i + 1, pair.odd);
          }
          if (i < n) put(i, normal_value(key, index + std::uint64_t(i)));
        },
        x);
  });
}

// Blocks of 256 rows are summed by threads, then their sums in order.
void CpuDevice::do_column_sums(View sums, const ConstView& x) {
  constexpr std::int64_t block = 256;
  const std::int64_t n = x.cols, blocks = (x.rows + block - 1) / block;
  double* partial = shared_scratch_.get<double>(blocks * n);
  with_float_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    const auto& functions = row_functions<T>();
#pragma omp parallel for num_threads(threads_) schedule(static) if (x.size() > least_parallel)
    for (std::int64_t b = 0; b < blocks; ++b) {
      std::fill_n(partial + b * n, n, 0.0);
      for (std::int64_t r = b * block; r < std::min(x.rows, (b + 1) * block); ++r)
        functions.accumulate_double(partial + b * n, row_of<T>(x, r), n);
    }
  });
  with_float_type(sums.dtype, [&](auto s) {
    using S = decltype(s);
    for (std::int64_t i = 0; i < n; ++i) {
      double total = double(Compute<S>(sums.as<S>()[i]));
      for (std::int64_t b = 0; b < blocks; ++b) total += partial[b * n + i];
      sums.as<S>()[i] = S(Compute<S>(total));
    }
  });
}

// Spans of fixed size, added in order: the number of threads does not matter.
void CpuDevice::do_sum_of_squares(View sum, const ConstView& x) {
  const std::int64_t row_spans = ((x.contiguous() ? x.size() : x.cols) + span - 1) / span;
  const std::int64_t spans = x.contiguous() ? row_spans : x.rows * row_spans;
  double* partial = shared_scratch_.get<double>(spans);
  with_float_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    const auto& functions = row_functions<T>();
    for_spans(
        threads_,
        [=, &functions](std::int64_t r, std::int64_t first, std::int64_t n) {
          partial[r * row_spans + first / span] = functions.sum_of_squares(row_of<T>(x, r) + first, n);
        },
        x);
  });
  double total = *sum.as<double>();
  for (std::int64_t i = 0; i < spans; ++i) total += partial[i];
  *sum.as<double>() = total;
}

void CpuDevice::do_embedding(View out, const ConstView& table, const ConstView& ids, std::int32_t first_id) {
  const std::size_t width = std::size_t(out.cols) * size_of(out.dtype);
  const std::int32_t* tokens = ids.as<std::int32_t>();
  for_rows(threads_, out, [=](std::int64_t r) {
    const std::int64_t id = std::int64_t(tokens[r]) - first_id;
    if (id >= 0 && id < table.rows)
      std::memcpy(bytes_of(out, r), bytes_of(table, id), width);
    else
      std::memset(bytes_of(out, r), 0, width);
  });
}

// Threads share the columns, so rows that share an id are added in order.
void CpuDevice::do_embedding_backward(View dtable, const ConstView& dout, const ConstView& ids, std::int32_t first_id) {
  constexpr std::int64_t block = 128;
  const std::int32_t* tokens = ids.as<std::int32_t>();
  with_float_type(dout.dtype, [&](auto t) {
    using T = decltype(t);
    const auto& functions = row_functions<T>();
#pragma omp parallel for num_threads(threads_) schedule(static) if (dout.size() > least_parallel)
    for (std::int64_t first = 0; first < dout.cols; first += block)
      for (std::int64_t r = 0; r < dout.rows; ++r) {
        const std::int64_t id = std::int64_t(tokens[r]) - first_id;
        if (id >= 0 && id < dtable.rows)
          functions.accumulate(row_of<Compute<T>>(dtable, id) + first, row_of<T>(dout, r) + first,
                               std::min(block, dout.cols - first));
      }
  });
}

void CpuDevice::do_rms_norm(View y, View inv_rms, const ConstView& x, const ConstView& w, float eps) {
  with_float_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    const auto& functions = row_functions<T>();
    const std::int64_t n = w.cols;
    for_rows(threads_, x, [=, &functions](std::int64_t r) {
      for (std::int64_t g = 0; g < x.cols / n; ++g)
        functions.rms_norm(row_of<T>(y, r) + g * n, row_of<Compute<T>>(inv_rms, r) + g, row_of<T>(x, r) + g * n,
                           w.as<T>(), n, eps);
    });
  });
}

void CpuDevice::do_add_rms_norm(View sum, View y, View inv_rms, const ConstView& x, const ConstView& delta,
                                const ConstView& w, float eps) {
  with_float_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    const auto& functions = row_functions<T>();
    const std::int64_t n = w.cols;
    for_rows(threads_, x, [=, &functions](std::int64_t r) {
      for (std::int64_t g = 0; g < x.cols / n; ++g)
        functions.add_rms_norm(row_of<T>(sum, r) + g * n, row_of<T>(y, r) + g * n, row_of<Compute<T>>(inv_rms, r) + g,
                               row_of<T>(x, r) + g * n, row_of<T>(delta, r) + g * n, w.as<T>(), n, eps);
    });
  });
}

// dw: blocks of 64 rows are summed by threads, then their sums in order.
void CpuDevice::norm_backward(View dx, View dw, const ConstView& dy, const ConstView* dskip, const ConstView& x,
                              const ConstView& w, const ConstView& inv_rms) {
  constexpr std::int64_t block = 64;
  const std::int64_t n = w.cols, blocks = (x.rows + block - 1) / block;
  with_float_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    const auto& functions = row_functions<T>();
    C* partial = shared_scratch_.get<C>(blocks * n);
#pragma omp parallel for num_threads(threads_) schedule(static) if (x.size() > least_parallel)
    for (std::int64_t b = 0; b < blocks; ++b) {
      std::fill_n(partial + b * n, n, C(0));
      for (std::int64_t r = b * block; r < std::min(x.rows, (b + 1) * block); ++r)
        for (std::int64_t g = 0; g < x.cols / n; ++g)
          functions.rms_norm_backward(row_of<T>(dx, r) + g * n, partial + b * n, row_of<T>(dy, r) + g * n,
                                      dskip ? row_of<T>(*dskip, r) + g * n : nullptr, row_of<T>(x, r) + g * n,
                                      w.as<T>(), row_of<C>(inv_rms, r)[g], n);
    }
    for (std::int64_t b = 0; b < blocks; ++b) accumulate_row(Lone{}, dw.as<C>(), partial + b * n, n);
  });
}

void CpuDevice::do_rms_norm_backward(View dx, View dw, const ConstView& dy, const ConstView& x, const ConstView& w,
                                     const ConstView& inv_rms) {
  norm_backward(dx, dw, dy, nullptr, x, w, inv_rms);
}

void CpuDevice::do_rms_norm_backward_add(View dx, View dw, const ConstView& dy, const ConstView& dskip,
                                         const ConstView& x, const ConstView& w, const ConstView& inv_rms) {
  norm_backward(dx, dw, dy, &dskip, x, w, inv_rms);
}

void CpuDevice::do_rope(View x, const ConstView& positions, const ConstView& table, int head_dim, bool inverse) {
  with_float_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    const auto& functions = row_functions<T>();
    const std::int32_t* position = positions.as<std::int32_t>();
    for_rows(threads_, x, [=, &functions](std::int64_t r) {
      functions.rope(row_of<T>(x, r), row_of<Compute<T>>(table, position[r]), x.cols / head_dim, head_dim, inverse);
    });
  });
}

void CpuDevice::do_swiglu(View y, const ConstView& gate_up) {
  with_float_type(y.dtype, [&](auto t) {
    using T = decltype(t);
    const auto& functions = row_functions<T>();
    for_rows(threads_, y, [=, &functions](std::int64_t r) {
      const T* gate = row_of<T>(gate_up, r);
      functions.swiglu(row_of<T>(y, r), gate, gate + y.cols, y.cols);
    });
  });
}

void CpuDevice::do_swiglu_backward(View dgate_up, const ConstView& dy, const ConstView& gate_up) {
  with_float_type(dy.dtype, [&](auto t) {
    using T = decltype(t);
    const auto& functions = row_functions<T>();
    const std::int64_t n = dy.cols;
    for_rows(threads_, dy, [=, &functions](std::int64_t r) {
      T* dgate = row_of<T>(dgate_up, r);
      const T* gate = row_of<T>(gate_up, r);
      functions.swiglu_backward(dgate, dgate + n, row_of<T>(dy, r), gate, gate + n, n);
    });
  });
}

void CpuDevice::do_adamw(View param, View master, View m, View v, const ConstView& grad, const AdamWStep& step) {
  with_float_type(param.dtype, [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    const auto& functions = row_functions<T>();
    const AdamWFactors<C> factors(step);
    C* weight = master.data ? master.as<C>() : static_cast<C*>(param.mutable_data());
    T* narrow = master.data ? param.as<T>() : nullptr;
    for_spans(
        threads_,
        [=, &functions](std::int64_t, std::int64_t first, std::int64_t n) {
          functions.adamw(narrow ? narrow + first : nullptr, weight + first, m.as<C>() + first, v.as<C>() + first,
                          grad.as<C>() + first, n, factors);
        },
        param);
  });
}

}  // namespace distill
