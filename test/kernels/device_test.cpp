// The conformance suite: every operation of every backend in every number type against test/support/reference.h, on odd
// shapes, with gaps between rows that must stay untouched, and with no rows at all. Built once for each file that
// defines backends().
#include "core/device.h"

#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>

#include "core/random.h"
#include "test/support/backends.h"
#include "test/support/reference.h"

namespace distill {
namespace {

using reference::Arithmetic;
using reference::by_functions_of_double;
using reference::Matrix;
using reference::Number;
using test::Backend;
using test::backends;

using Generator = std::function<double(std::int64_t, std::int64_t)>;

// A matrix in device memory with `gap` unused elements after each row, and what the host knows of it.
class Operand {
 public:
  Operand(Device& device, std::int64_t rows, std::int64_t cols, DType type, std::int64_t gap, const Generator& value)
      : device_(&device), storage_(device.tensor(rows, cols + gap, type)), cols_(cols) {
    fill([&](std::int64_t r, std::int64_t c) { return c < cols ? value(r, c) : gap_value; });
  }

  View view() { return storage_.view().col_slice(0, cols_); }
  DType dtype() const { return storage_.view().dtype; }

  // The values that the device holds, exactly.
  Matrix numbers() const { return reference::columns(read(), 0, cols_); }

  // Every element within the error that the reference allows, after rounding to this operand's type; gaps as they were.
  void check_close(const Matrix& expected) const {
    const Matrix all = read();
    const std::string what = text(device_->name(), " with ", device_->threads(), " threads, ", storage_.view(), ": ");
    if (expected.rows != all.rows || expected.cols != cols_) FAIL(what << "expected another shape");
    // f64 references are calculated in the precision under test: both sides may be wrong.
    const double sides = dtype() == DType::f64 ? 2 : 1;
    for (std::int64_t r = 0; r < all.rows; ++r)
      for (std::int64_t c = 0; c < all.cols; ++c) {
        const double found = all(r, c).value;
        if (c >= cols_) {
          if (found != gap_value) FAIL(what << "gap after row " << r << " was written");
          continue;
        }
        const Number allowed = Arithmetic::kept_as(expected(r, c), dtype());
        if (!(std::abs(found - allowed.value) <= sides * allowed.error))
          FAIL(what << "element " << r << ',' << c << " is " << found << ", expected " << allowed.value << " within "
                    << sides * allowed.error);
      }
    SUCCEED();
  }

  static constexpr double gap_value = -77;  // exact in every type

 private:
  void fill(const Generator& value) {
    const View v = storage_.view();
    with_float_type(v.dtype, [&](auto t) {
      using T = decltype(t);
      std::vector<T> host(std::size_t(v.size()));
      for (std::int64_t i = 0; i < v.size(); ++i) host[std::size_t(i)] = T(Compute<T>(value(i / v.cols, i % v.cols)));
      device_->upload(v, host.data());
    });
  }
  Matrix read() const {
    const ConstView v = storage_.view();
    Matrix m(v.rows, v.cols);
    with_float_type(v.dtype, [&](auto t) {
      using T = decltype(t);
      std::vector<T> host(std::size_t(v.size()));
      device_->download(host.data(), v);
      for (std::size_t i = 0; i < host.size(); ++i) m.values[i] = double(Compute<T>(host[i]));
    });
    return m;
  }

  Device* device_;
  Tensor storage_;
  std::int64_t cols_;
};

Tensor integers(Device& device, const std::vector<std::int32_t>& values) {
  Tensor t = device.tensor(1, std::int64_t(values.size()), DType::i32);
  device.upload(t.view(), values.data());
  return t;
}

// One test case's device, number type and random numbers.
struct Fixture {
  std::shared_ptr<Device> owner;
  Device& device;
  DType type, wide;
  Arithmetic arithmetic;
  std::mt19937 random{11};

  Fixture(const Backend& backend, DType t)
      : owner(backend.make()), device(*owner), type(t), wide(wide_type(t)), arithmetic(t) {}

  double normal(double deviation = 1) { return std::normal_distribution<double>(0, deviation)(random); }
  Generator normals(double deviation = 1, double mean = 0) {
    return [=, this](auto, auto) { return mean + normal(deviation); };
  }
  Operand make(std::int64_t rows, std::int64_t cols, std::int64_t gap = 0, double deviation = 1, double mean = 0) {
    return {device, rows, cols, type, gap, normals(deviation, mean)};
  }
  Operand make_wide(std::int64_t rows, std::int64_t cols, std::int64_t gap = 0, double deviation = 1) {
    return {device, rows, cols, wide, gap, normals(deviation)};
  }
};

Fixture any_fixture() {
  const Backend backend = GENERATE(from_range(backends()));
  const DType type = GENERATE(DType::f32, DType::bf16, DType::f16, DType::f64);
  return {backend, type};
}

struct Shape {
  std::int64_t rows, cols, gap;
};
// No rows, one element, less than a vector, odd, whole vectors, more than one span of a thread.
Shape any_shape() {
  const Shape s = GENERATE(Shape{0, 5, 0}, Shape{1, 1, 0}, Shape{3, 7, 2}, Shape{5, 16, 0}, Shape{17, 33, 3},
                           Shape{130, 64, 0}, Shape{2, 20011, 1});
  return s;
}

// --- elementwise and moves

TEST_CASE("zero", "[device]") {
  Fixture f = any_fixture();
  const Shape s = any_shape();
  Operand x = f.make(s.rows, s.cols, s.gap);
  f.device.zero(x.view());
  x.check_close(Matrix(s.rows, s.cols));
}

TEST_CASE("cast between all floating types", "[device]") {
  Fixture f = any_fixture();
  const DType to_type = GENERATE(DType::f32, DType::bf16, DType::f16, DType::f64);
  const Shape s = any_shape();
  Operand from = f.make(s.rows, s.cols, s.gap), to(f.device, s.rows, s.cols, to_type, 2 * s.gap, f.normals());
  f.device.cast(to.view(), from.view());
  if (size_of(to_type) > size_of(f.type) || to_type == f.type) {
    const Matrix a = to.numbers(), b = from.numbers();
    for (std::size_t i = 0; i < a.values.size(); ++i)
      if (a.values[i].value != b.values[i].value) FAIL("widening changed " << b.values[i].value);
  }
  // On the way from f64 to 16 bits a value may be rounded to f32 first.
  to.check_close(f.type == DType::f64 ? reference::kept(from.numbers(), DType::f32) : from.numbers());
}

TEST_CASE("casts round to nearest even and keep infinity and NaN", "[device]") {
  const Backend backend = GENERATE(from_range(backends()));
  const auto device = backend.make();
  const DType type = GENERATE(DType::bf16, DType::f16);
  std::vector<float> values = {0.0f,  -0.0f,   INFINITY, -INFINITY, NAN,        65504.0f, 65519.0f, 65520.0f,
                               1e38f, 3.4e38f, 1e-8f,    0x1p-24f,  0x1.8p-25f, 0x1p-25f, 0x1p-14f};
  std::mt19937 random(3);
  while (values.size() < 4096) {  // any pattern of bits, and ties
    const std::uint32_t bits = std::uint32_t(random());
    values.push_back(std::bit_cast<float>(bits));
    values.push_back(std::bit_cast<float>((bits & 0xffff0000u) | 0x8000u));
    values.push_back(std::bit_cast<float>((bits & 0x8fffe000u) | 0x38001000u));
  }
  const std::int64_t n = std::int64_t(values.size());
  Tensor from = device->tensor(1, n, DType::f32), to = device->tensor(1, n, type),
         back = device->tensor(1, n, DType::f32);
  device->upload(from.view(), values.data());
  device->cast(to.view(), from.view());
  device->cast(back.view(), to.view());
  std::vector<float> found(values.size());
  device->download(found.data(), back.view());
  for (std::size_t i = 0; i < values.size(); ++i) {
    const float expected = type == DType::bf16 ? float(bf16(values[i])) : float(f16(values[i]));
    const bool same = std::isnan(expected)
                          ? std::isnan(found[i])
                          : std::bit_cast<std::uint32_t>(found[i]) == std::bit_cast<std::uint32_t>(expected);
    if (!same) FAIL(values[i] << " became " << found[i] << " instead of " << expected);
  }
  SUCCEED();
}

TEST_CASE("add, also in place", "[device]") {
  Fixture f = any_fixture();
  const Shape s = any_shape();
  Operand a = f.make(s.rows, s.cols, s.gap), b = f.make(s.rows, s.cols), sum = f.make(s.rows, s.cols, 2 * s.gap);
  const Matrix x = a.numbers(), y = b.numbers();
  const Matrix expected =
      reference::matrix(s.rows, s.cols, [&](auto r, auto c) { return f.arithmetic.add(x(r, c), y(r, c)); });
  f.device.add(sum.view(), a.view(), b.view());
  sum.check_close(expected);
  f.device.add(a.view(), a.view(), b.view());
  a.check_close(expected);
}

TEST_CASE("add_bias", "[device]") {
  Fixture f = any_fixture();
  const Shape s = any_shape();
  Operand x = f.make(s.rows, s.cols, s.gap), bias = f.make(1, s.cols);
  const Matrix before = x.numbers(), b = bias.numbers();
  f.device.add_bias(x.view(), bias.view());
  x.check_close(
      reference::matrix(s.rows, s.cols, [&](auto r, auto c) { return f.arithmetic.add(before(r, c), b(0, c)); }));
}

TEST_CASE("gather_rows and scatter_rows", "[device]") {
  Fixture f = any_fixture();
  const std::vector<std::int32_t> rows = GENERATE(std::vector<std::int32_t>{}, std::vector<std::int32_t>{4, 0, 6, 2});
  const std::int64_t n = std::int64_t(rows.size()), cols = GENERATE(3, 130);
  Operand whole = f.make(7, cols, 3), part = f.make(n, cols, 1);
  const Tensor index = integers(f.device, rows);
  f.device.gather_rows(part.view(), whole.view(), index.view());
  const Matrix source = whole.numbers();
  part.check_close(reference::matrix(n, cols, [&](auto r, auto c) { return source(rows[std::size_t(r)], c); }));

  Operand other = f.make(n, cols, 2);
  f.device.scatter_rows(whole.view(), other.view(), index.view());
  Matrix expected = source;
  const Matrix written = other.numbers();
  for (std::int64_t r = 0; r < n; ++r)
    for (std::int64_t c = 0; c < cols; ++c) expected(rows[std::size_t(r)], c) = written(r, c);
  whole.check_close(expected);
}

TEST_CASE("fill_normal is a function of seed, tensor and index", "[device]") {
  Fixture f = any_fixture();
  const std::int64_t first = GENERATE(0, 1, 1001);
  const Shape s = GENERATE(Shape{1, 1, 0}, Shape{3, 7, 2}, Shape{2, 20011, 0});
  Operand x = f.make(s.rows, s.cols, s.gap);
  f.device.fill_normal(x.view(), 5, 9, first, 0.5f);
  const std::uint64_t key = random_key(5, 9);
  x.check_close(reference::matrix(s.rows, s.cols, [&](auto r, auto c) {
    return f.arithmetic.mul(0.5, by_functions_of_double(normal_value(key, std::uint64_t(first + r * s.cols + c))));
  }));
}

TEST_CASE("column_sums", "[device]") {
  Fixture f = any_fixture();
  const Shape s = GENERATE(Shape{0, 5, 0}, Shape{1, 1, 0}, Shape{17, 33, 3}, Shape{777, 41, 0});
  const DType sum_type = GENERATE(false, true) ? f.wide : DType::f64;
  Operand x = f.make(s.rows, s.cols, s.gap, 1, 0.3), sums(f.device, 1, s.cols, sum_type, 0, f.normals());
  const Matrix before = sums.numbers(), m = x.numbers();
  f.device.column_sums(sums.view(), x.view());
  sums.check_close(reference::matrix(1, s.cols, [&](auto, auto c) {
    std::vector<Number> terms = {before(0, c)};
    for (std::int64_t r = 0; r < s.rows; ++r) terms.push_back(m(r, c));
    return Arithmetic(sum_type).sum(terms);
  }));
}

TEST_CASE("sum_of_squares adds in double", "[device]") {
  Fixture f = any_fixture();
  const Shape s = any_shape();
  Operand x = f.make(s.rows, s.cols, s.gap), sum(f.device, 1, 1, DType::f64, 0, [](auto, auto) { return 2.5; });
  f.device.sum_of_squares(sum.view(), x.view());
  const Arithmetic n(DType::f64);
  std::vector<Number> terms = {2.5};
  for (const Number& v : x.numbers().values) terms.push_back(n.mul(v, v));
  Matrix expected(1, 1);
  expected(0, 0) = n.sum(terms);
  sum.check_close(expected);
}

TEST_CASE("sum_of_squares lets infinity and NaN through", "[device]") {
  Fixture f = any_fixture();
  const double bad = GENERATE(double(NAN), double(INFINITY));
  const std::int64_t n = GENERATE(5, 40000), at = n - 1;
  Operand x(f.device, 1, n, f.type, 0, [&](auto, auto c) { return c == at ? bad : 1.0; });
  Operand sum(f.device, 1, 1, DType::f64, 0, [](auto, auto) { return 0.0; });
  f.device.sum_of_squares(sum.view(), x.view());
  CHECK_FALSE(std::isfinite(sum.numbers()(0, 0).value));
}

TEST_CASE("embedding and its backward", "[device]") {
  Fixture f = any_fixture();
  const std::int64_t cols = GENERATE(5, 300), rows = 6;
  // Ids of other ranks' tables on both sides, repeated ids, and no ids.
  const std::vector<std::int32_t> ids =
      GENERATE(std::vector<std::int32_t>{}, std::vector<std::int32_t>{12, 9, 10, 15, 10, 16, 10, 0, 11});
  const std::int32_t first_id = 10;
  const std::int64_t t = std::int64_t(ids.size());
  const Tensor tokens = integers(f.device, ids);
  const auto row_of = [&](std::int64_t i) { return std::int64_t(ids[std::size_t(i)]) - first_id; };

  Operand table = f.make(rows, cols, 3), out = f.make(t, cols, 1);
  f.device.embedding(out.view(), table.view(), tokens.view(), first_id);
  const Matrix values = table.numbers();
  out.check_close(reference::matrix(
      t, cols, [&](auto i, auto c) { return row_of(i) >= 0 && row_of(i) < rows ? values(row_of(i), c) : Number(); }));

  Operand dtable = f.make_wide(rows, cols, 2), dout = f.make(t, cols, 1);
  const Matrix before = dtable.numbers(), gradient = dout.numbers();
  f.device.embedding_backward(dtable.view(), dout.view(), tokens.view(), first_id);
  dtable.check_close(reference::matrix(rows, cols, [&](auto r, auto c) {
    std::vector<Number> terms = {before(r, c)};
    for (std::int64_t i = 0; i < t; ++i)
      if (row_of(i) == r) terms.push_back(gradient(i, c));
    return f.arithmetic.sum(terms);
  }));
}

TEST_CASE("an id may come again after hundreds of others", "[device]") {
  Fixture f = any_fixture();
  const std::int64_t cols = 3, t = 530;
  std::vector<std::int32_t> ids;
  for (std::int32_t i = 0; i < t; ++i) ids.push_back(i % 50 == 7 ? 0 : i % 2 + 1);
  const Tensor tokens = integers(f.device, ids);
  Operand dtable = f.make_wide(3, cols), dout = f.make(t, cols);
  const Matrix before = dtable.numbers(), gradient = dout.numbers();
  f.device.embedding_backward(dtable.view(), dout.view(), tokens.view());
  dtable.check_close(reference::matrix(3, cols, [&](auto r, auto c) {
    std::vector<Number> terms = {before(r, c)};
    for (std::int64_t i = 0; i < t; ++i)
      if (ids[std::size_t(i)] == r) terms.push_back(gradient(i, c));
    return f.arithmetic.sum(terms);
  }));
}

// --- products

struct Product {
  std::int64_t m, n, k, gap;
};

TEST_CASE("gemm in all layouts", "[device]") {
  Fixture f = any_fixture();
  const Product p = GENERATE(Product{1, 1, 1, 0}, Product{3, 5, 7, 0}, Product{3, 5, 7, 3}, Product{17, 33, 65, 0},
                             Product{300, 7, 20, 1}, Product{5, 90, 1, 0});
  const bool a_transposed = GENERATE(false, true), b_transposed = GENERATE(false, true);
  const bool wide_result = GENERATE(false, true);
  const Write write = GENERATE(Write::overwrite, Write::accumulate);
  CAPTURE(p.m, p.n, p.k, p.gap, a_transposed, b_transposed, wide_result, write == Write::accumulate);
  Operand a = a_transposed ? f.make(p.k, p.m, p.gap) : f.make(p.m, p.k, p.gap);
  Operand b = b_transposed ? f.make(p.n, p.k, 2 * p.gap) : f.make(p.k, p.n, 2 * p.gap);
  Operand c(f.device, p.m, p.n, wide_result ? f.wide : f.type, p.gap, f.normals());
  const Matrix before = c.numbers();
  const auto as_factor = [](const Matrix& m, bool is_transposed) { return is_transposed ? transpose(m) : m; };
  const Matrix expected =
      reference::product(f.arithmetic, as_factor(a.numbers(), a_transposed), as_factor(b.numbers(), b_transposed),
                         write == Write::accumulate ? &before : nullptr);
  f.device.gemm(c.view(), {a.view(), a_transposed}, {b.view(), b_transposed}, write);
  c.check_close(expected);
}

TEST_CASE("gemm of blocks: a long sum, many rows, many columns", "[device]") {
  Fixture f = any_fixture();
  const Product p = GENERATE(Product{3, 5, 4201, 0}, Product{1100, 3, 5, 0}, Product{2, 1100, 4, 0});
  const bool a_transposed = GENERATE(false, true);
  CAPTURE(p.m, p.n, p.k, a_transposed);
  Operand a = a_transposed ? f.make(p.k, p.m) : f.make(p.m, p.k), b = f.make(p.k, p.n);
  Operand c = f.make_wide(p.m, p.n), narrow = f.make(p.m, p.n);
  const Matrix expected =
      reference::product(f.arithmetic, a_transposed ? transpose(a.numbers()) : a.numbers(), b.numbers());
  f.device.gemm(c.view(), {a.view(), a_transposed}, b.view());
  c.check_close(expected);
  f.device.gemm(narrow.view(), {a.view(), a_transposed}, b.view());
  narrow.check_close(expected);
}

TEST_CASE("gemm without rows, columns or terms", "[device]") {
  Fixture f = any_fixture();
  const Product p = GENERATE(Product{0, 3, 4, 0}, Product{3, 0, 4, 0}, Product{3, 4, 0, 0});
  Operand a = f.make(p.m, p.k), b = f.make(p.k, p.n), c = f.make(p.m, p.n);
  f.device.gemm(c.view(), a.view(), b.view());
  c.check_close(Matrix(p.m, p.n));
}

// --- norms

struct NormShape {
  std::int64_t rows, groups, width, gap;
};
// The widest one takes more shared memory than a GPU gives without being asked.
NormShape any_norm_shape() {
  const NormShape s =
      GENERATE(NormShape{0, 1, 8, 0}, NormShape{1, 1, 1, 0}, NormShape{5, 1, 33, 2}, NormShape{3, 4, 16, 5},
               NormShape{150, 3, 24, 0}, NormShape{2, 1, 1000, 0}, NormShape{1, 1, 12000, 0});
  return s;
}
constexpr float eps = 1e-5f;

TEST_CASE("rms_norm and its backward", "[device]") {
  Fixture f = any_fixture();
  const NormShape s = any_norm_shape();
  const std::int64_t cols = s.groups * s.width;
  Operand x = f.make(s.rows, cols, s.gap, 2), w = f.make(1, s.width, 0, 0.3, 1), y = f.make(s.rows, cols, 2 * s.gap);
  Operand inv_rms = f.make_wide(s.rows, s.groups, s.gap);
  f.device.rms_norm(y.view(), inv_rms.view(), x.view(), w.view(), eps);
  const Matrix mx = x.numbers(), mw = w.numbers();
  inv_rms.check_close(inverse_rms(f.arithmetic, mx, s.width, double(eps)));
  y.check_close(rms_norm(f.arithmetic, mx, mw, double(eps)));

  Operand dy = f.make(s.rows, cols, s.gap), dx = f.make(s.rows, cols, s.gap), dw = f.make_wide(1, s.width);
  const auto expected =
      reference::rms_norm_backward(f.arithmetic, dy.numbers(), mx, mw, inv_rms.numbers(), dw.numbers());
  f.device.rms_norm_backward(dx.view(), dw.view(), dy.view(), x.view(), w.view(), inv_rms.view());
  dx.check_close(expected.dx);
  dw.check_close(expected.dw);

  const Matrix separate = dx.numbers();
  f.device.rms_norm_backward(dy.view(), dw.view(), dy.view(), x.view(), w.view(), inv_rms.view());
  const Matrix in_place = dy.numbers();
  for (std::size_t i = 0; i < separate.values.size(); ++i)
    if (separate.values[i].value != in_place.values[i].value) FAIL("in place differs");
}

// What one implementation of `formula` gave, as another may find it: both have its error.
Matrix given(Matrix numbers, const Matrix& formula, DType type) {
  for (std::size_t i = 0; i < numbers.values.size(); ++i)
    numbers.values[i].error = formula.values[i].error + Arithmetic::kept_as(formula.values[i], type).error;
  return numbers;
}

TEST_CASE("the fused norms are their plain definitions", "[device]") {
  Fixture f = any_fixture();
  const NormShape s = any_norm_shape();
  const std::int64_t cols = s.groups * s.width;
  Operand x = f.make(s.rows, cols, s.gap), delta = f.make(s.rows, cols), w = f.make(1, s.width, 0, 0.3, 1);
  Operand sum = f.make(s.rows, cols), y = f.make(s.rows, cols), inv_rms = f.make_wide(s.rows, s.groups);
  Operand plain_sum = f.make(s.rows, cols), plain_y = f.make(s.rows, cols), plain_inv = f.make_wide(s.rows, s.groups);
  f.device.add_rms_norm(sum.view(), y.view(), inv_rms.view(), x.view(), delta.view(), w.view(), eps);
  f.device.plain_add_rms_norm(plain_sum.view(), plain_y.view(), plain_inv.view(), x.view(), delta.view(), w.view(),
                              eps);
  const Matrix inverse = inverse_rms(f.arithmetic, plain_sum.numbers(), s.width, double(eps)),
               normed = rms_norm(f.arithmetic, plain_sum.numbers(), w.numbers(), double(eps));
  plain_inv.check_close(inverse);
  plain_y.check_close(normed);
  sum.check_close(plain_sum.numbers());
  inv_rms.check_close(given(plain_inv.numbers(), inverse, f.wide));
  y.check_close(given(plain_y.numbers(), normed, f.type));

  Operand dy = f.make(s.rows, cols), skip = f.make(s.rows, cols), dx = f.make(s.rows, cols, s.gap),
          dw = f.make_wide(1, s.width), plain_dx = f.make(s.rows, cols);
  Operand plain_dw(f.device, 1, s.width, f.wide, 0,
                   [before = dw.numbers()](auto r, auto c) { return before(r, c).value; });
  const auto branch = reference::rms_norm_backward(f.arithmetic, dy.numbers(), x.numbers(), w.numbers(),
                                                   inv_rms.numbers(), dw.numbers());
  const Matrix mskip = skip.numbers();
  const Matrix both = reference::matrix(
      s.rows, cols, [&](auto r, auto c) { return f.arithmetic.add(f.arithmetic.kept(branch.dx(r, c)), mskip(r, c)); });
  f.device.rms_norm_backward_add(dx.view(), dw.view(), dy.view(), skip.view(), x.view(), w.view(), inv_rms.view());
  f.device.plain_rms_norm_backward_add(plain_dx.view(), plain_dw.view(), dy.view(), skip.view(), x.view(), w.view(),
                                       inv_rms.view());
  plain_dx.check_close(both);
  plain_dw.check_close(branch.dw);
  dx.check_close(given(plain_dx.numbers(), both, f.type));
  dw.check_close(given(plain_dw.numbers(), branch.dw, f.wide));
}

// --- rotary embedding and gate

TEST_CASE("rope turns, and its inverse turns back", "[device]") {
  Fixture f = any_fixture();
  const int head_dim = GENERATE(2, 6, 64, 80);
  const std::int64_t heads = GENERATE(1, 3), rows = GENERATE(0, 5), cols = heads * head_dim;
  const bool inverse = GENERATE(false, true);
  std::vector<std::int32_t> positions;
  for (std::int64_t r = 0; r < rows; ++r) positions.push_back(std::int32_t(r * 3 % 7));
  const Tensor position = integers(f.device, positions);
  Operand table(f.device, 7, head_dim, f.wide, 0, [&](auto p, auto c) {
    const double angle = double(p) / std::pow(10.0, double(c % (head_dim / 2)));
    return c < head_dim / 2 ? std::cos(angle) : std::sin(angle);
  });
  Operand x = f.make(rows, cols, 3);
  const Matrix expected = rope(f.arithmetic, x.numbers(), positions, table.numbers(), head_dim, inverse);
  f.device.rope(x.view(), position.view(), table.view(), head_dim, inverse);
  x.check_close(expected);
}

TEST_CASE("swiglu and its backward", "[device]") {
  Fixture f = any_fixture();
  const Shape s = any_shape();
  Operand gate_up = f.make(s.rows, 2 * s.cols, s.gap, 3), y = f.make(s.rows, s.cols, s.gap);
  f.device.swiglu(y.view(), gate_up.view());
  y.check_close(swiglu(f.arithmetic, gate_up.numbers()));
  Operand dy = f.make(s.rows, s.cols, s.gap), dgate_up = f.make(s.rows, 2 * s.cols, 2 * s.gap);
  f.device.swiglu_backward(dgate_up.view(), dy.view(), gate_up.view());
  dgate_up.check_close(swiglu_backward(f.arithmetic, dy.numbers(), gate_up.numbers()));
}

TEST_CASE("swiglu of extreme gates is finite and right in the limit", "[device]") {
  Fixture f = any_fixture();
  const std::vector<double> gates = {-60000, -1000, -100, -88, -20, 0, 20, 100, 60000};
  const std::int64_t n = std::int64_t(gates.size());
  Operand gate_up(f.device, 1, 2 * n, f.type, 0, [&](auto, auto c) { return c < n ? gates[std::size_t(c)] : 1.0; });
  Operand y = f.make(1, n), dy(f.device, 1, n, f.type, 0, [](auto, auto) { return 1.0; }), dgate_up = f.make(1, 2 * n);
  f.device.swiglu(y.view(), gate_up.view());
  f.device.swiglu_backward(dgate_up.view(), dy.view(), gate_up.view());
  const Matrix found = y.numbers(), d = dgate_up.numbers(), x = gate_up.numbers();
  for (std::int64_t i = 0; i < n; ++i) {
    const double g = x(0, i).value, s = 1 / (1 + std::exp(-g));
    const auto [u, tiny] = reference::rounding_of(f.type);
    CHECK(found(0, i).value == Approx(g * s).epsilon(4 * u).margin(1e-30 + tiny));
    CHECK(d(0, i).value == Approx(s * (1 + g * (1 - s))).epsilon(16 * u).margin(1e-6));
    CHECK(d(0, n + i).value == Approx(g * s).epsilon(4 * u).margin(1e-30 + tiny));
  }
}

TEST_CASE("swiglu lets NaN through", "[device]") {
  Fixture f = any_fixture();
  const std::int64_t n = 40;
  Operand gate_up(f.device, 1, 2 * n, f.type, 0, [&](auto, auto c) { return c == 3 || c == n + 35 ? NAN : 1.0; });
  Operand y = f.make(1, n), dgate_up = f.make(1, 2 * n), dy = f.make(1, n, 0, 0, 1);
  f.device.swiglu(y.view(), gate_up.view());
  f.device.swiglu_backward(dgate_up.view(), dy.view(), gate_up.view());
  for (const std::int64_t c : {3, 35}) {
    CHECK(std::isnan(y.numbers()(0, c).value));
    CHECK(std::isnan(dgate_up.numbers()(0, c).value));
  }
  CHECK(std::isfinite(y.numbers()(0, 4).value));
}

// --- attention

struct AttentionCase {
  int q_heads, kv_heads, head_dim, window;
  std::vector<std::int32_t> offsets;
};

// gap: unused elements after the rows, several times that after some.
void check_attention(Fixture& f, const AttentionCase& a, std::int64_t gap = 1) {
  CAPTURE(gap, a.q_heads, a.kv_heads, a.head_dim, a.window, a.offsets);
  const std::int64_t t = a.offsets.back(), q_cols = std::int64_t(a.q_heads) * a.head_dim,
                     kv_cols = std::int64_t(a.kv_heads) * a.head_dim;
  const AttentionShape shape{a.q_heads, a.kv_heads, a.head_dim, 1.5f / std::sqrt(float(a.head_dim)), a.window};
  const Tensor offsets = integers(f.device, a.offsets);
  Segments segments{offsets.view()};
  for (std::size_t s = 0; s + 1 < a.offsets.size(); ++s)
    segments.longest = std::max(segments.longest, a.offsets[s + 1] - a.offsets[s]);
  // q, k and v as the model has them: slices of one matrix.
  Operand qkv = f.make(t, q_cols + 2 * kv_cols, 3 * gap), dqkv = f.make(t, q_cols + 2 * kv_cols, gap);
  const auto slices = [&](const View& all) {
    return std::array<View, 3>{all.col_slice(0, q_cols), all.col_slice(q_cols, kv_cols),
                               all.col_slice(q_cols + kv_cols, kv_cols)};
  };
  const auto [q, k, v] = slices(qkv.view());
  const auto [dq, dk, dv] = slices(dqkv.view());
  Operand out = f.make(t, q_cols, 2 * gap), log_sum = f.make_wide(t, a.q_heads, 1), dout = f.make(t, q_cols, gap);
  try {
    f.device.attention(out.view(), log_sum.view(), q, k, v, segments, shape);
  } catch (const Error& error) {
    // Not every GPU has the shared memory for the widest heads in f64, which is for checks only.
    if (f.type != DType::f64 || a.head_dim <= 128 || !std::strstr(error.what(), "of shared memory a block")) throw;
    WARN(error.what());
    return;
  }
  const Matrix all = qkv.numbers(), mq = reference::columns(all, 0, q_cols),
               mk = reference::columns(all, q_cols, kv_cols), mv = reference::columns(all, q_cols + kv_cols, kv_cols);
  const reference::AttentionFormula formula(f.arithmetic, mq, mk, mv, a.offsets, shape);
  const reference::Attention expected = formula.forward();
  out.check_close(expected.out);
  log_sum.check_close(expected.log_sum);

  f.device.attention_backward(dq, dk, dv, dout.view(), q, k, v, out.view(), log_sum.view(), segments, shape);
  const auto gradients = formula.backward(dout.numbers(), out.numbers(), log_sum.numbers());
  dqkv.check_close(reference::matrix(t, q_cols + 2 * kv_cols, [&](auto r, auto c) {
    if (c < q_cols) return gradients.dq(r, c);
    return c < q_cols + kv_cols ? gradients.dk(r, c - q_cols) : gradients.dv(r, c - q_cols - kv_cols);
  }));
}

// Every path of every backend once: plain and tensor-core kernels, each number of columns that a lane may own, groups
// of heads, windows, sequences longer than a block and of one token.
TEST_CASE("attention and its backward", "[device]") {
  Fixture f = any_fixture();
  SECTION("heads of any size") {
    const int head_dim = GENERATE(16, 18, 40, 80, 256);
    check_attention(f, {2, 1, head_dim, 0, {0, 1, 18, 18, 29}});
  }
  SECTION("groups of heads and windows") {
    const auto [heads, group, window] = GENERATE(std::array{1, 2, 5}, std::array{2, 1, 1}, std::array{1, 7, 0});
    check_attention(f, {heads * group, heads, 16, window, {0, 13, 14, 40}});
  }
  SECTION("sequences of several blocks") { check_attention(f, {1, 1, 16, GENERATE(0, 70), {0, 37, 180}}); }
  SECTION("rows that tensor cores can take") {
    if (size_of(f.type) > 2) return;
    const int head_dim = GENERATE(64, 128), window = GENERATE(0, 40);
    const int group = window > 0 ? 2 : 1;
    check_attention(f, {group, 1, head_dim, window, {0, 1, 70, 70, 103}}, 8);
  }
  SECTION("one sequence, one token") { check_attention(f, {2, 2, 16, 0, {0, 1}}); }
  SECTION("nothing") { check_attention(f, {2, 2, 16, 0, {0}}); }
}

TEST_CASE("attention and its backward in many shapes", "[device][many]") {
  Fixture f = any_fixture();
  SECTION("heads of any size") {
    const int head_dim = GENERATE(16, 18, 40, 64, 80, 128, 256);
    check_attention(f, {3, 1, head_dim, 0, {0, 1, 38, 38, 71}});
  }
  SECTION("groups of heads and windows") {
    const int heads = GENERATE(1, 2, 3), group = GENERATE(1, 2, 7), window = GENERATE(0, 1, 5, 100);
    check_attention(f, {heads * group, heads, 16, window, {0, 13, 14, 40}});
  }
  SECTION("sequences of several blocks") {
    const int window = GENERATE(0, 150);
    check_attention(f, {2, 1, 16, window, {0, 97, 450}});
  }
  SECTION("rows that tensor cores can take") {
    const int head_dim = GENERATE(64, 128), window = GENERATE(0, 40);
    check_attention(f, {4, 2, head_dim, window, {0, 1, 70, 70, 150}}, 8);
  }
}

TEST_CASE("attention of extreme scores is finite", "[device]") {
  Fixture f = any_fixture();
  const std::int64_t t = 70;
  // Scores of ±1e4 and equal scores: one key takes all, or all share.
  Operand q(f.device, t, 16, f.type, 0, [](auto r, auto) { return r % 2 == 0 ? 25.0 : 0.0; });
  Operand k(f.device, t, 16, f.type, 0, [](auto r, auto) { return r % 3 == 0 ? 25.0 : -25.0; });
  Operand v = f.make(t, 16), out = f.make(t, 16), log_sum = f.make_wide(t, 1), dq = f.make(t, 16), dk = f.make(t, 16),
          dv = f.make(t, 16), dout = f.make(t, 16);
  const Tensor offsets = integers(f.device, {0, std::int32_t(t)});
  const AttentionShape shape{1, 1, 16, 1, 0};
  const Segments segments{offsets.view(), int(t)};
  f.device.attention(out.view(), log_sum.view(), q.view(), k.view(), v.view(), segments, shape);
  f.device.attention_backward(dq.view(), dk.view(), dv.view(), dout.view(), q.view(), k.view(), v.view(), out.view(),
                              log_sum.view(), segments, shape);
  for (Operand* o : {&out, &log_sum, &dq, &dk, &dv})
    for (const Number& x : o->numbers().values) REQUIRE(std::isfinite(x.value));
  CHECK(log_sum.numbers()(0, 0).value == Approx(10000).epsilon(1e-6));
  CHECK(log_sum.numbers()(69, 0).value == Approx(std::log(70)).epsilon(1e-6));
}

// --- optimiser

TEST_CASE("adamw", "[device]") {
  Fixture f = any_fixture();
  const std::int64_t n = GENERATE(1, 37, 40003);
  const int t = GENERATE(1, 1000);
  const bool has_master = f.type != f.wide || GENERATE(false, true);
  AdamWStep step{.lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8, .weight_decay = 0.1, .grad_scale = 0.5};
  step.bias_correction1 = 1 - std::pow(step.beta1, t);
  step.bias_correction2 = 1 - std::pow(step.beta2, t);
  Operand param = f.make(1, n), master = f.make_wide(1, n), m = f.make_wide(1, n), grad = f.make_wide(1, n);
  Operand v(f.device, 1, n, f.wide, 0, [&](auto, auto) { return std::abs(f.normal()); });
  const Matrix w0 = has_master ? master.numbers() : param.numbers(), m0 = m.numbers(), v0 = v.numbers(),
               g = grad.numbers();
  f.device.adamw(param.view(), has_master ? master.view() : View(), m.view(), v.view(), grad.view(), step);
  Matrix w1(1, n), m1(1, n), v1(1, n);
  for (std::int64_t i = 0; i < n; ++i) {
    const auto next = reference::adamw(f.arithmetic, {w0(0, i), m0(0, i), v0(0, i)}, g(0, i), step);
    w1(0, i) = next.weight;
    m1(0, i) = next.m;
    v1(0, i) = next.v;
  }
  param.check_close(w1);
  if (has_master) master.check_close(w1);
  m.check_close(m1);
  v.check_close(v1);
}

// --- every backward is the derivative of its forward, in f64

// Σ weights ∘ values
double inner(const Matrix& weights, const Matrix& values) {
  double sum = 0;
  for (std::size_t i = 0; i < weights.values.size(); ++i) sum += weights.values[i].value * values.values[i].value;
  return sum;
}

// d/dh f(x + h·direction) at 0 by central differences: the error is O(h²) + O(u/h).
template <class F>
double derivative(F along) {
  const double h = 1e-5;
  return (along(h) - along(-h)) / (2 * h);
}

// x + h·direction, on the device.
Operand moved(Fixture& f, const Operand& x, const Matrix& direction, double h) {
  const Matrix m = x.numbers();
  return {f.device,   m.rows, m.cols,
          DType::f64, 0,      [&](auto r, auto c) { return m(r, c).value + h * direction(r, c).value; }};
}

TEST_CASE("backward is the derivative of forward", "[device]") {
  Fixture f(GENERATE(from_range(backends())), DType::f64);
  const std::int64_t t = 29, cols = 24;
  Operand x = f.make(t, cols), dy = f.make(t, cols);
  const Matrix direction = f.make(t, cols).numbers();

  SECTION("rms_norm") {
    Operand w = f.make(1, 8, 0, 0.3, 1), y = f.make(t, cols), inv = f.make(t, 3), dx = f.make(t, cols);
    Operand dw(f.device, 1, 8, DType::f64, 0, [](auto, auto) { return 0.0; });
    const Matrix w_direction = f.make(1, 8).numbers();
    const auto loss = [&](double hx, double hw) {
      Operand at = moved(f, x, direction, hx), w_at = moved(f, w, w_direction, hw);
      f.device.rms_norm(y.view(), inv.view(), at.view(), w_at.view(), eps);
      return inner(dy.numbers(), y.numbers());
    };
    loss(0, 0);
    f.device.rms_norm_backward(dx.view(), dw.view(), dy.view(), x.view(), w.view(), inv.view());
    CHECK(inner(dx.numbers(), direction) == Approx(derivative([&](double h) { return loss(h, 0); })).epsilon(1e-7));
    CHECK(inner(dw.numbers(), w_direction) == Approx(derivative([&](double h) { return loss(0, h); })).epsilon(1e-7));
  }
  SECTION("rope") {
    std::vector<std::int32_t> positions;
    for (std::int64_t r = 0; r < t; ++r) positions.push_back(std::int32_t(r));
    const Tensor position = integers(f.device, positions);
    Operand table(f.device, t, 8, DType::f64, 0,
                  [](auto p, auto c) { return c < 4 ? std::cos(double(p + c)) : std::sin(double(p + c - 4)); });
    const auto loss = [&](double h) {
      Operand at = moved(f, x, direction, h);
      f.device.rope(at.view(), position.view(), table.view(), 8);
      return inner(dy.numbers(), at.numbers());
    };
    const double expected = derivative(loss);
    f.device.rope(dy.view(), position.view(), table.view(), 8, /*inverse=*/true);
    CHECK(inner(dy.numbers(), direction) == Approx(expected).epsilon(1e-7));
  }
  SECTION("swiglu") {
    Operand y = f.make(t, cols / 2), half = f.make(t, cols / 2), dx = f.make(t, cols);
    const auto loss = [&](double h) {
      Operand at = moved(f, x, direction, h);
      f.device.swiglu(y.view(), at.view());
      return inner(half.numbers(), y.numbers());
    };
    f.device.swiglu_backward(dx.view(), half.view(), x.view());
    CHECK(inner(dx.numbers(), direction) == Approx(derivative(loss)).epsilon(1e-7));
  }
  SECTION("attention") {
    const int window = GENERATE(0, 4);
    const Tensor offsets = integers(f.device, {0, 3, 29});
    const Segments segments{offsets.view(), 26};
    const AttentionShape shape{4, 2, 3, 0.6f, window};
    Operand out = f.make(t, 12), log_sum = f.make(t, 4), dout = f.make(t, 12), dx = f.make(t, cols);
    const auto run = [&](Operand& at) {
      const View v = at.view();
      f.device.attention(out.view(), log_sum.view(), v.col_slice(0, 12), v.col_slice(12, 6), v.col_slice(18, 6),
                         segments, shape);
      return inner(dout.numbers(), out.numbers());
    };
    const double expected = derivative([&](double h) {
      Operand at = moved(f, x, direction, h);
      return run(at);
    });
    run(x);
    const View v = x.view(), d = dx.view();
    f.device.attention_backward(d.col_slice(0, 12), d.col_slice(12, 6), d.col_slice(18, 6), dout.view(),
                                v.col_slice(0, 12), v.col_slice(12, 6), v.col_slice(18, 6), out.view(), log_sum.view(),
                                segments, shape);
    CHECK(inner(dx.numbers(), direction) == Approx(expected).epsilon(1e-7));
  }
  SECTION("embedding") {
    const std::vector<std::int32_t> ids = {3, 1, 3, 0};
    const Tensor tokens = integers(f.device, ids);
    Operand out = f.make(4, cols), dout = f.make(4, cols);
    Operand dtable(f.device, t, cols, DType::f64, 0, [](auto, auto) { return 0.0; });
    const auto loss = [&](double h) {
      Operand at = moved(f, x, direction, h);
      f.device.embedding(out.view(), at.view(), tokens.view());
      return inner(dout.numbers(), out.numbers());
    };
    f.device.embedding_backward(dtable.view(), dout.view(), tokens.view());
    CHECK(inner(dtable.numbers(), direction) == Approx(derivative(loss)).epsilon(1e-7));
  }
}

}  // namespace
}  // namespace distill
