// Operations that treat every element, or every row, on its own. The maths is kernels/rows.h over the few elements that
// a thread holds in registers.
#include "kernels/cuda/language.h"  // before what includes the toolkit's headers

#include "core/random.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/memory.cuh"
#include "kernels/rows.h"

namespace distill {

using namespace cuda;

namespace {

// Rows of bytes, all types alike: units of 16 bytes where everything is aligned, else of 2.
struct ByteRows {
  unsigned char* data;
  std::int64_t stride;  // in bytes
};
ByteRows byte_rows(const ConstView& v) {
  return {static_cast<unsigned char*>(const_cast<void*>(v.data)), v.stride * std::int64_t(size_of(v.dtype))};
}
std::int64_t row_bytes(const ConstView& v) { return v.cols * std::int64_t(size_of(v.dtype)); }

template <class... Views>
bool in_units_of_16(const Views&... views) {
  return ((reinterpret_cast<std::uintptr_t>(views.data) % 16 == 0 && row_bytes(views) % 16 == 0 &&
           (views.rows <= 1 || byte_rows(views).stride % 16 == 0)) &&
          ...);
}

template <class Unit>
__global__ void zero_kernel(ByteRows to, std::int64_t rows, std::int64_t units) {
  for_chunks<1>(rows, units, [=](std::int64_t r, std::int64_t i, int) {
    reinterpret_cast<Unit*>(to.data + r * to.stride)[i] = Unit{};
  });
}

// Row to_row[r] (or r) of `to` = row from_row[r] − first (or r) of `from`; zeros where `from` has no such row.
template <class Unit>
__global__ void copy_rows_kernel(ByteRows to, const std::int32_t* to_row, ByteRows from, const std::int32_t* from_row,
                                 std::int64_t first, std::int64_t from_rows, std::int64_t rows, std::int64_t units) {
  for_chunks<1>(rows, units, [=](std::int64_t r, std::int64_t i, int) {
    const std::int64_t source = from_row ? std::int64_t(from_row[r]) - first : r, target = to_row ? to_row[r] : r;
    Unit value{};
    if (source >= 0 && source < from_rows) value = reinterpret_cast<const Unit*>(from.data + source * from.stride)[i];
    reinterpret_cast<Unit*>(to.data + target * to.stride)[i] = value;
  });
}

void copy_rows(cudaStream_t stream, const View& to, const std::int32_t* to_row, const ConstView& from,
               const std::int32_t* from_row, std::int64_t first, std::int64_t rows) {
  const auto go = [&](auto unit) {
    using Unit = decltype(unit);
    const Chunks c = chunks_of(rows, row_bytes(to) / std::int64_t(sizeof(Unit)), 1);
    launch(copy_rows_kernel<Unit>, c.grid, stream, byte_rows(to), to_row, byte_rows(from), from_row, first, from.rows,
           c.rows, c.cols);
  };
  in_units_of_16(to, from) ? go(uint4{}) : go(std::uint16_t{});
}

template <class To, class From>
inline constexpr int cast_width = sizeof(To) == 2 || sizeof(From) == 2 ? 8 : 4;

template <class To, class From>
__global__ void cast_kernel(Rows<To> to, Rows<const From> from, std::int64_t rows, std::int64_t cols) {
  constexpr int n = cast_width<To, From>;
  for_chunks<n>(rows, cols, [=](std::int64_t r, std::int64_t c, int count) {
    const auto x = load<n>(from[r] + c, count, from.is_aligned);
    Few<To, n> y;
    cast_row(Lone{}, y.value, x.value, n);
    store(to[r] + c, y, count, to.is_aligned);
  });
}

template <class T>
__global__ void add_kernel(Rows<T> sum, Rows<const T> a, Rows<const T> b, std::int64_t rows, std::int64_t cols) {
  constexpr int n = pack<T>;
  for_chunks<n>(rows, cols, [=](std::int64_t r, std::int64_t c, int count) {
    const auto x = load<n>(a[r] + c, count, a.is_aligned), y = load<n>(b[r] + c, count, b.is_aligned);
    Few<T, n> z;
    add_row(Lone{}, z.value, x.value, y.value, n);
    store(sum[r] + c, z, count, sum.is_aligned);
  });
}

template <class T>
__global__ void fill_normal_kernel(Rows<T> x, std::uint64_t key, std::int64_t first, double deviation,
                                   std::int64_t rows, std::int64_t cols) {
  for_chunks<1>(rows, cols, [=](std::int64_t r, std::int64_t c, int) {
    x[r][c] = T(Compute<T>(deviation * normal_value(key, std::uint64_t(first + r * cols + c))));
  });
}

template <class T>
__global__ void swiglu_kernel(Rows<T> y, Rows<const T> gate, Rows<const T> up, std::int64_t rows, std::int64_t cols) {
  constexpr int n = pack<T>;
  for_chunks<n>(rows, cols, [=](std::int64_t r, std::int64_t c, int count) {
    const auto g = load<n>(gate[r] + c, count, gate.is_aligned), u = load<n>(up[r] + c, count, up.is_aligned);
    Few<T, n> z;
    swiglu_row(Lone{}, z.value, g.value, u.value, n);
    store(y[r] + c, z, count, y.is_aligned);
  });
}

template <class T>
__global__ void swiglu_backward_kernel(Rows<T> dgate, Rows<T> dup, Rows<const T> dy, Rows<const T> gate,
                                       Rows<const T> up, std::int64_t rows, std::int64_t cols) {
  constexpr int n = pack<T>;
  for_chunks<n>(rows, cols, [=](std::int64_t r, std::int64_t c, int count) {
    const auto d = load<n>(dy[r] + c, count, dy.is_aligned), g = load<n>(gate[r] + c, count, gate.is_aligned),
               u = load<n>(up[r] + c, count, up.is_aligned);
    Few<T, n> dg, du;
    swiglu_backward_row(Lone{}, dg.value, du.value, d.value, g.value, u.value, n);
    store(dgate[r] + c, dg, count, dgate.is_aligned);
    store(dup[r] + c, du, count, dup.is_aligned);
  });
}

// A thread turns n pairs of one head: columns are counted in pairs, half a head after half a head.
template <class T>
__global__ void rope_kernel(Rows<T> x, const std::int32_t* positions, Rows<const Compute<T>> table, int head_dim,
                            bool inverse, std::int64_t rows, std::int64_t heads) {
  constexpr int n = pack<T>;
  const int half = head_dim / 2, chunks = (half + n - 1) / n;
  const bool x_aligned = x.is_aligned && half % n == 0, table_aligned = table.is_aligned && half % n == 0;
  for_chunks<1>(rows, heads * chunks, [=](std::int64_t r, std::int64_t i, int) {
    const int first = int(i % chunks) * n, count = half - first < n ? half - first : n;
    T* const head = x[r] + i / chunks * head_dim + first;
    const Compute<T>* const angles = table[positions[r]] + first;
    const auto a = load<n>(head, count, x_aligned), b = load<n>(head + half, count, x_aligned);
    const auto cosine = load<n>(angles, count, table_aligned), sine = load<n>(angles + half, count, table_aligned);
    // As one head of 2n columns.
    T pairs[2 * n];
    Compute<T> turns[2 * n];
    for (int k = 0; k < n; ++k) {
      pairs[k] = a.value[k], pairs[n + k] = b.value[k];
      turns[k] = cosine.value[k], turns[n + k] = sine.value[k];
    }
    rope_row(Lone{}, pairs, turns, 1, 2 * n, inverse);
    Few<T, n> first_half, second_half;
    for (int k = 0; k < n; ++k) first_half.value[k] = pairs[k], second_half.value[k] = pairs[n + k];
    store(head, first_half, count, x_aligned);
    store(head + half, second_half, count, x_aligned);
  });
}

// narrow is null where the parameters are their own master copy.
template <class T>
__global__ void adamw_kernel(Rows<T> narrow, Rows<Compute<T>> weight, Rows<Compute<T>> m, Rows<Compute<T>> v,
                             Rows<const Compute<T>> grad, AdamWFactors<Compute<T>> factors, std::int64_t size) {
  constexpr int n = pack<T>;
  for_chunks<n>(1, size, [&](std::int64_t, std::int64_t i, int count) {
    auto w = load<n>(weight.data + i, count, weight.is_aligned), m_ = load<n>(m.data + i, count, m.is_aligned),
         v_ = load<n>(v.data + i, count, v.is_aligned);
    const auto g = load<n>(grad.data + i, count, grad.is_aligned);
    Few<T, n> copy;
    adamw_row(Lone{}, copy.value, w.value, m_.value, v_.value, g.value, n, factors);
    store(weight.data + i, w, count, weight.is_aligned);
    store(m.data + i, m_, count, m.is_aligned);
    store(v.data + i, v_, count, v.is_aligned);
    if (narrow.data) store(narrow.data + i, copy, count, narrow.is_aligned);
  });
}

}  // namespace

void CudaDevice::do_zero(View x) {
  const View to = x.contiguous() && x.size() > 0 ? x.reshaped(1, x.size()) : x;
  const auto go = [&](auto unit) {
    using Unit = decltype(unit);
    const Chunks c = chunks_of(to.rows, row_bytes(to) / std::int64_t(sizeof(Unit)), 1);
    launch(zero_kernel<Unit>, c.grid, stream(), byte_rows(to), c.rows, c.cols);
  };
  in_units_of_16(to) ? go(uint4{}) : go(std::uint16_t{});
}

void CudaDevice::do_cast(View to, const ConstView& from) {
  if (to.dtype == from.dtype) return copy_rows(stream(), to, nullptr, from, nullptr, 0, to.rows);
  with_float_type(to.dtype, [&](auto t) {
    with_float_type(from.dtype, [&](auto f) {
      using To = decltype(t);
      using From = decltype(f);
      if constexpr (!std::is_same_v<To, From>) {
        const Chunks c = chunks_of_all(cast_width<To, From>, to, from);
        launch(cast_kernel<To, From>, c.grid, stream(), rows_of<To>(to), rows_of<From>(from), c.rows, c.cols);
      }
    });
  });
}

void CudaDevice::do_add(View sum, const ConstView& a, const ConstView& b) {
  with_float_type(sum.dtype, [&](auto t) {
    using T = decltype(t);
    const Chunks c = chunks_of_all(pack<T>, sum, a, b);
    launch(add_kernel<T>, c.grid, stream(), rows_of<T>(sum), rows_of<T>(a), rows_of<T>(b), c.rows, c.cols);
  });
}

void CudaDevice::do_add_bias(View x, const ConstView& bias) {
  with_float_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    const Chunks c = chunks_of(x.rows, x.cols, pack<T>);
    Rows<const T> same_row = rows_of<T>(bias);
    same_row.stride = 0;
    launch(add_kernel<T>, c.grid, stream(), rows_of<T>(x), rows_of<T>(ConstView(x)), same_row, c.rows, c.cols);
  });
}

void CudaDevice::do_gather_rows(View out, const ConstView& x, const ConstView& rows) {
  copy_rows(stream(), out, nullptr, x, rows.as<std::int32_t>(), 0, out.rows);
}

void CudaDevice::do_scatter_rows(View out, const ConstView& x, const ConstView& rows) {
  copy_rows(stream(), out, rows.as<std::int32_t>(), x, nullptr, 0, x.rows);
}

void CudaDevice::do_embedding(View out, const ConstView& table, const ConstView& ids, std::int32_t first_id) {
  copy_rows(stream(), out, nullptr, table, ids.as<std::int32_t>(), first_id, out.rows);
}

void CudaDevice::do_fill_normal(View x, std::uint64_t seed, std::uint64_t tensor, std::int64_t first, float std) {
  with_float_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    const Chunks c = chunks_of(x.rows, x.cols, 1);
    launch(fill_normal_kernel<T>, c.grid, stream(), rows_of<T>(x), random_key(seed, tensor), first, double(std), c.rows,
           c.cols);
  });
}

void CudaDevice::do_swiglu(View y, const ConstView& gate_up) {
  with_float_type(y.dtype, [&](auto t) {
    using T = decltype(t);
    const Chunks c = chunks_of(y.rows, y.cols, pack<T>);
    launch(swiglu_kernel<T>, c.grid, stream(), rows_of<T>(y), rows_of<T>(gate_up.col_slice(0, y.cols)),
           rows_of<T>(gate_up.col_slice(y.cols, y.cols)), c.rows, c.cols);
  });
}

void CudaDevice::do_swiglu_backward(View dgate_up, const ConstView& dy, const ConstView& gate_up) {
  with_float_type(dy.dtype, [&](auto t) {
    using T = decltype(t);
    const std::int64_t n = dy.cols;
    const Chunks c = chunks_of(dy.rows, n, pack<T>);
    launch(swiglu_backward_kernel<T>, c.grid, stream(), rows_of<T>(dgate_up.col_slice(0, n)),
           rows_of<T>(dgate_up.col_slice(n, n)), rows_of<T>(dy), rows_of<T>(gate_up.col_slice(0, n)),
           rows_of<T>(gate_up.col_slice(n, n)), c.rows, c.cols);
  });
}

void CudaDevice::do_rope(View x, const ConstView& positions, const ConstView& table, int head_dim, bool inverse) {
  with_float_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    const std::int64_t heads = x.cols / head_dim, chunks = (head_dim / 2 + pack<T> - 1) / pack<T>;
    const Chunks c = chunks_of(x.rows, heads * chunks, 1);
    launch(rope_kernel<T>, c.grid, stream(), rows_of<T>(x), positions.as<std::int32_t>(), rows_of<Compute<T>>(table),
           head_dim, inverse, c.rows, heads);
  });
}

void CudaDevice::do_adamw(View param, View master, View m, View v, const ConstView& grad, const AdamWStep& step) {
  with_float_type(param.dtype, [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    // Without a master copy param is wide itself, so T is C.
    const View weight = master.data ? master : View(param.mutable_data(), 1, param.cols, wide_type(param.dtype));
    const Chunks c = chunks_of(1, param.cols, pack<T>);
    launch(adamw_kernel<T>, c.grid, stream(), master.data ? rows_of<T>(param) : Rows<T>(), rows_of<C>(weight),
           rows_of<C>(m), rows_of<C>(v), rows_of<C>(grad), AdamWFactors<C>(step), c.cols);
  });
}

}  // namespace distill
