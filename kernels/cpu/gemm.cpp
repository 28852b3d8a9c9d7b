// Which oneDNN primitive, as measured with 2.6: matmul (brgemm) loses 10% on y = x Wᵀ and a quarter on dW += dyᵀ x, and
// compiles 0.3 ms for each new shape (the number of tokens changes with every micro-batch);
// inner_product on plain layouts runs the packing gemm: near the peak in any layout, 0.1 ms for a new shape.
#include "kernels/cpu/gemm.h"

#include <omp.h>

#include <algorithm>
#include <dnnl.hpp>
#include <list>
#include <unordered_map>

#include "kernels/cpu/row_functions.h"
#include "kernels/cpu/scratch.h"

namespace distill {

namespace {

using Memory = dnnl::memory;

bool is_dense(const ConstView& v) { return v.contiguous(); }

// rows × columns of a matrix, counted in its own layout.
ConstView tile(const ConstView& v, std::int64_t row, std::int64_t rows, std::int64_t col, std::int64_t cols) {
  return v.row_slice(row, rows).col_slice(col, cols);
}
// Rows [i, i + m) and columns [p, p + k) of a factor.
Factor tile_of(const Factor& f, std::int64_t i, std::int64_t m, std::int64_t p, std::int64_t k) {
  return f.is_transposed ? transposed(tile(f.matrix, p, k, i, m)) : Factor(tile(f.matrix, i, m, p, k));
}

// Equal blocks of at most `most` rows, a multiple of 64 where there are several.
std::int64_t block_rows(std::int64_t rows, std::int64_t most) {
  if (rows <= most) return rows;
  const std::int64_t blocks = (rows + most - 1) / most;
  return ((rows + blocks - 1) / blocks + 63) / 64 * 64;
}

// c (+)= a b in double: gradient checks only.
void product_f64(View c, const Factor& a, const Factor& b, Write write, int threads) {
  const double *pa = a.matrix.as<double>(), *pb = b.matrix.as<double>();
  const std::int64_t ai = a.is_transposed ? 1 : a.matrix.stride, ak = a.is_transposed ? a.matrix.stride : 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t i = 0; i < c.rows; ++i) {
    double* row = c.as<double>() + i * c.stride;
    if (write == Write::overwrite) std::fill(row, row + c.cols, 0.0);
    if (b.is_transposed) {
      for (std::int64_t j = 0; j < c.cols; ++j) {
        double sum = 0;
        for (std::int64_t k = 0; k < a.cols(); ++k) sum += pa[i * ai + k * ak] * pb[j * b.matrix.stride + k];
        row[j] += sum;
      }
    } else {
      for (std::int64_t k = 0; k < a.cols(); ++k) {
        const double left = pa[i * ai + k * ak];
        for (std::int64_t j = 0; j < c.cols; ++j) row[j] += left * pb[k * b.matrix.stride + j];
      }
    }
  }
}

// c (+)= a b, all f32, any strides.
void product_f32(View c, const Factor& a, const Factor& b, Write write) {
  const auto status = dnnl::sgemm(a.is_transposed ? 'T' : 'N', b.is_transposed ? 'T' : 'N', c.rows, c.cols, a.cols(), 1,
                                  a.matrix.as<float>(), a.matrix.stride, b.matrix.as<float>(), b.matrix.stride,
                                  write == Write::accumulate ? 1 : 0, c.as<float>(), c.stride);
  check(status == dnnl::status::success, "oneDNN sgemm failed with ", int(status), ": ", c, " = ", a.matrix, ' ',
        b.matrix);
}

// c [m, n] (+)= a [m, k] bᵀ, all dense; b stored [n, k], or [k, n] when b_by_columns.
struct InnerProductShape {
  std::int64_t m, n, k;
  bool b_by_columns, accumulate;
  DType out;
  bool operator==(const InnerProductShape&) const = default;
};
struct HashShape {
  std::size_t operator()(const InnerProductShape& s) const {
    std::size_t hash = 0;
    for (const std::int64_t part : {s.m, s.n, s.k, std::int64_t(s.b_by_columns) + 2 * s.accumulate + 4 * int(s.out)})
      hash = (hash ^ std::size_t(part)) * 0x9e3779b97f4a7c15u;
    return hash ^ (hash >> 32);
  }
};

class InnerProduct {
 public:
  InnerProduct(const InnerProductShape& s, const dnnl::engine& engine) {
    const auto narrow = Memory::data_type::bf16;
    const Memory::desc a({s.m, s.k}, narrow, Memory::dims{s.k, 1});
    const Memory::desc b({s.n, s.k}, narrow, s.b_by_columns ? Memory::dims{1, s.n} : Memory::dims{s.k, 1});
    const Memory::desc c({s.m, s.n}, s.out == DType::bf16 ? narrow : Memory::data_type::f32, Memory::dims{s.n, 1});
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (s.accumulate) {
      dnnl::post_ops sum;
      sum.append_sum(1.0f);
      attributes.set_post_ops(sum);
    }
    const dnnl::inner_product_forward::primitive_desc description({dnnl::prop_kind::forward_inference, a, b, c},
                                                                  attributes, engine);
    run_ = dnnl::inner_product_forward(description);
    a_ = Memory(a, engine, nullptr);
    b_ = Memory(b, engine, nullptr);
    c_ = Memory(c, engine, nullptr);
    scratchpad_ = Memory(description.scratchpad_desc(), engine, nullptr);
    scratchpad_bytes_ = description.scratchpad_desc().get_size();
    arguments_ = {{DNNL_ARG_SRC, a_}, {DNNL_ARG_WEIGHTS, b_}, {DNNL_ARG_DST, c_}, {DNNL_ARG_SCRATCHPAD, scratchpad_}};
  }

  void operator()(dnnl::stream& stream, void* c, const void* a, const void* b, Scratch& scratchpad) {
    a_.set_data_handle(const_cast<void*>(a));
    b_.set_data_handle(const_cast<void*>(b));
    c_.set_data_handle(c);
    scratchpad_.set_data_handle(scratchpad.bytes(scratchpad_bytes_));
    run_.execute(stream, arguments_);
    stream.wait();
  }

 private:
  dnnl::inner_product_forward run_;
  Memory a_, b_, c_, scratchpad_;
  std::size_t scratchpad_bytes_ = 0;
  std::unordered_map<int, Memory> arguments_;
};

}  // namespace

struct MatrixProduct::State {
  explicit State(int thread_count) : threads(thread_count) {}

  void bf16_product(View c, const Factor& a, const Factor& b, Write write);
  void widened_product(View c, const Factor& a, const Factor& b, Write write);
  InnerProduct& inner_product(const InnerProductShape& shape);
  const bf16* dense_rows(const Factor& a, std::int64_t first, std::int64_t rows);
  template <class T>
  Factor widened(const Factor& from, Scratch& memory);
  template <class T>
  void narrow(View to, const ConstView& from, Write write);

  int threads;
  // Products in bf16 need AVX-512; without it they are as slow as scalar code.
  const bool has_bf16 = dnnl::get_effective_cpu_isa() >= dnnl::cpu_isa::avx512_core;
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  // The newest first: shapes come and go with the number of tokens.
  std::list<std::pair<InnerProductShape, InnerProduct>> products;
  std::unordered_map<InnerProductShape, decltype(products)::iterator, HashShape> product_of;
  Scratch scratchpad, rows, wide_a, wide_b, wide_c;
};

InnerProduct& MatrixProduct::State::inner_product(const InnerProductShape& shape) {
  constexpr std::size_t most_products = 1024;
  if (const auto found = product_of.find(shape); found != product_of.end()) {
    products.splice(products.begin(), products, found->second);
    return found->second->second;
  }
  if (products.size() == most_products) {
    product_of.erase(products.back().first);
    products.pop_back();
  }
  products.emplace_front(shape, InnerProduct(shape, engine));
  product_of.emplace(shape, products.begin());
  return products.front().second;
}

// Rows [first, first + rows) of a as a dense matrix: the memory itself or a copy.
const bf16* MatrixProduct::State::dense_rows(const Factor& a, std::int64_t first, std::int64_t rows_wanted) {
  const std::int64_t k = a.cols();
  if (!a.is_transposed && is_dense(a.matrix)) return a.matrix.as<bf16>() + first * k;
  bf16* to = rows.get<bf16>(rows_wanted * k);
  const Factor part = tile_of(a, first, rows_wanted, 0, k);
  const bf16* from = part.matrix.as<bf16>();
  const std::int64_t stride = part.matrix.stride;
  if (!a.is_transposed) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t r = 0; r < rows_wanted; ++r) std::copy_n(from + r * stride, k, to + r * k);
    return to;
  }
  const auto transpose = transpose_16_bit();
  constexpr std::int64_t block = 64;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t r = 0; r < rows_wanted; r += block)
    transpose(&to[r * k].bits, k, &from[r].bits, stride, k, std::min(block, rows_wanted - r));
  return to;
}

// By blocks of rows, so that neither the transposed copy of a nor the f32 product behind a bf16 result grows with the
// number of tokens or of columns.
void MatrixProduct::State::bf16_product(View c, const Factor& a, const Factor& b, Write write) {
  const std::int64_t n = c.cols, k = a.cols();
  const bool copies = a.is_transposed || !is_dense(a.matrix);
  std::int64_t most = c.rows;
  if (copies) most = std::max<std::int64_t>(256, (std::int64_t(8) << 20) / (2 * k));                     // 8 MB
  if (c.dtype == DType::bf16) most = std::min(most, std::max<std::int64_t>(256, (64 << 20) / (4 * n)));  // 64 MB
  const std::int64_t block = block_rows(c.rows, most);
  for (std::int64_t i = 0; i < c.rows; i += block) {
    const std::int64_t m = std::min(block, c.rows - i);
    InnerProduct& product = inner_product({m, n, k, !b.is_transposed, write == Write::accumulate, c.dtype});
    product(stream, c.row_slice(i, m).mutable_data(), dense_rows(a, i, m), b.matrix.data, scratchpad);
  }
}

// A dense f32 copy in the same layout.
template <class T>
Factor MatrixProduct::State::widened(const Factor& from, Scratch& memory) {
  const ConstView& v = from.matrix;
  float* to = memory.get<float>(v.size());
  const auto& functions = row_functions<T>();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t r = 0; r < v.rows; ++r) functions.widen(to + r * v.cols, v.as<T>() + r * v.stride, v.cols);
  return {ConstView{to, v.rows, v.cols, v.cols, DType::f32}, from.is_transposed};
}

template <class T>
void MatrixProduct::State::narrow(View to, const ConstView& from, Write write) {
  const auto& functions = row_functions<T>();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t r = 0; r < to.rows; ++r) {
    T* row = to.as<T>() + r * to.stride;
    float* sum = const_cast<float*>(from.as<float>()) + r * from.stride;
    if (write == Write::accumulate) functions.accumulate(sum, row, to.cols);
    functions.narrow(row, sum, to.cols);
  }
}

// Operands in 16 bits that oneDNN does not multiply as they are: f32 products of tiles.
void MatrixProduct::State::widened_product(View c, const Factor& a, const Factor& b, Write write) {
  const std::int64_t k = a.cols();
  const std::int64_t mb = block_rows(c.rows, 1024), nb = block_rows(c.cols, 1024), kb = block_rows(k, 2048);
  const auto widen = [&](const Factor& f, Scratch& memory) {
    return f.matrix.dtype == DType::f16 ? widened<f16>(f, memory) : widened<bf16>(f, memory);
  };
  for (std::int64_t i = 0; i < c.rows; i += mb)
    for (std::int64_t j = 0; j < c.cols; j += nb) {
      const std::int64_t m = std::min(mb, c.rows - i), n = std::min(nb, c.cols - j);
      const View to = c.row_slice(i, m).col_slice(j, n);
      const bool direct = c.dtype == DType::f32;
      const View sum = direct ? to : View(wide_c.get<float>(m * n), m, n, DType::f32);
      for (std::int64_t p = 0; p < k; p += kb) {
        const std::int64_t depth = std::min(kb, k - p);
        const bool adds = p > 0 || (direct && write == Write::accumulate);
        product_f32(sum, widen(tile_of(a, i, m, p, depth), wide_a), widen(tile_of(b, p, depth, j, n), wide_b),
                    adds ? Write::accumulate : Write::overwrite);
      }
      if (c.dtype == DType::f16) narrow<f16>(to, sum, write);
      if (c.dtype == DType::bf16) narrow<bf16>(to, sum, write);
    }
}

MatrixProduct::MatrixProduct(int threads) : state_(std::make_unique<State>(threads)) {}
MatrixProduct::~MatrixProduct() = default;

void MatrixProduct::run(View c, const Factor& a, const Factor& b, Write write) {
  State& s = *state_;
  omp_set_num_threads(s.threads);  // oneDNN asks OpenMP how many there are; the setting belongs to the calling thread
  switch (a.matrix.dtype) {
    case DType::f64:
      return product_f64(c, a, b, write, s.threads);
    case DType::f32:
      return product_f32(c, a, b, write);
    default: {
      // inner_product takes whole matrices only, and adds in f32 only.
      const bool fits = a.matrix.dtype == DType::bf16 && s.has_bf16 && is_dense(b.matrix) && is_dense(c) &&
                        (c.dtype == DType::f32 || write == Write::overwrite);
      return fits ? s.bf16_product(c, a, b, write) : s.widened_product(c, a, b, write);
    }
  }
}

}  // namespace distill
