// Every row body of kernels/rows.h by one lane and by eight real threads, on rows shorter and longer than the team.
#include "kernels/rows.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <random>

#include "test/support/reference.h"
#include "test/support/thread_team.h"

namespace distill {
namespace {

using reference::Arithmetic;
using reference::Matrix;

constexpr float eps = 1e-5f;

// A row in memory and what it holds.
template <class T>
struct Row {
  std::vector<T> values;

  Row(std::mt19937& random, std::int64_t n, double deviation = 1, double mean = 0) {
    std::normal_distribution<double> normal(mean, deviation);
    for (std::int64_t i = 0; i < n; ++i) values.push_back(T(Compute<T>(normal(random))));
  }
  T* data() { return values.data(); }
  std::int64_t size() const { return std::int64_t(values.size()); }
  Matrix numbers() const {
    return reference::matrix(1, size(), [&](auto, auto i) { return double(Compute<T>(values[std::size_t(i)])); });
  }
  void check_close(const Matrix& expected) const {
    REQUIRE(expected.cols == size());
    // f64 references are calculated in the precision under test: both sides may be wrong.
    const double sides = std::is_same_v<T, double> ? 2 : 1;
    const Matrix found = numbers();
    for (std::int64_t i = 0; i < size(); ++i) {
      const auto allowed = Arithmetic::kept_as(expected(0, i), dtype_of<T>);
      CAPTURE(i, found(0, i).value, allowed.value, allowed.error);
      CHECK(std::abs(found(0, i).value - allowed.value) <= sides * allowed.error);
    }
  }
};

// How many lanes share rows of which length, and rows of random numbers.
template <class T>
struct Rows {
  using C = Compute<T>;
  std::mt19937 random{5};
  Arithmetic arithmetic{dtype_of<T>};
  int lanes = GENERATE(1, 8);
  std::int64_t n = GENERATE(1, 7, 64, 131);

  Row<T> row(double deviation = 1, double mean = 0) { return {random, n, deviation, mean}; }
  Row<T> rows(std::int64_t count) { return {random, count * n}; }
  Row<C> wide(double deviation = 1, double mean = 0) { return {random, n, deviation, mean}; }
  template <class Body>
  void run(Body body) const {
    run_team(lanes, body);
  }
};

#define DISTILL_ROW_TEST(name) TEMPLATE_TEST_CASE(name, "[rows][team]", float, bf16, f16, double)

DISTILL_ROW_TEST("rms_norm_row and add_rms_norm_row") {
  Rows<TestType> f;
  using C = Compute<TestType>;
  Row<TestType> x = f.row(2), delta = f.row(), w = f.row(0.3, 1), sum = f.row(), y = f.row();
  Row<C> inv(f.random, 1);
  f.run([&](ThreadTeam team) { rms_norm_row(team, y.data(), inv.data(), x.data(), w.data(), f.n, eps); });
  inv.check_close(inverse_rms(f.arithmetic, x.numbers(), f.n, double(eps)));
  y.check_close(rms_norm(f.arithmetic, x.numbers(), w.numbers(), double(eps)));

  f.run([&](ThreadTeam team) {
    add_rms_norm_row(team, sum.data(), y.data(), inv.data(), x.data(), delta.data(), w.data(), f.n, eps);
  });
  const Matrix a = x.numbers(), b = delta.numbers();
  sum.check_close(reference::matrix(1, f.n, [&](auto, auto i) { return f.arithmetic.add(a(0, i), b(0, i)); }));
  inv.check_close(inverse_rms(f.arithmetic, sum.numbers(), f.n, double(eps)));
  y.check_close(rms_norm(f.arithmetic, sum.numbers(), w.numbers(), double(eps)));
}

DISTILL_ROW_TEST("rms_norm_backward_row, also in place") {
  Rows<TestType> f;
  Row<TestType> dx = f.row(), dy = f.row(), skip = f.row(), x = f.row(2), w = f.row(0.3, 1);
  Row<Compute<TestType>> dw = f.wide(), inv(f.random, 1, 0.1, 0.5);
  const bool has_skip = GENERATE(false, true);
  const auto branch =
      reference::rms_norm_backward(f.arithmetic, dy.numbers(), x.numbers(), w.numbers(), inv.numbers(), dw.numbers());
  const Matrix beside = skip.numbers();
  const Matrix expected = reference::matrix(1, f.n, [&](auto, auto i) {
    return has_skip ? f.arithmetic.add(branch.dx(0, i), beside(0, i)) : branch.dx(0, i);
  });
  TestType* const to[] = {dx.data(), dy.data()};
  const Row<Compute<TestType>> before = dw;
  for (TestType* result : to) {
    dw = before;
    f.run([&](ThreadTeam team) {
      rms_norm_backward_row(team, result, dw.data(), dy.data(), has_skip ? skip.data() : nullptr, x.data(), w.data(),
                            inv.values[0], f.n);
    });
    dw.check_close(branch.dw);
  }
  dx.check_close(expected);
  dy.check_close(expected);
}

DISTILL_ROW_TEST("rope_row") {
  Rows<TestType> f;
  const std::int64_t heads = 3;
  const int head_dim = int(2 * f.n);
  const bool inverse = GENERATE(false, true);
  Row<TestType> x = f.rows(2 * heads);
  Row<Compute<TestType>> table(f.random, head_dim);
  const Matrix expected = rope(f.arithmetic, x.numbers(), {0}, table.numbers(), head_dim, inverse);
  f.run([&](ThreadTeam team) { rope_row(team, x.data(), table.data(), heads, head_dim, inverse); });
  x.check_close(expected);
}

DISTILL_ROW_TEST("swiglu_row and swiglu_backward_row") {
  Rows<TestType> f;
  Row<TestType> gate_up = f.rows(2), y = f.row(), dy = f.row(), dgate_up = f.rows(2);
  const TestType *gate = gate_up.data(), *up = gate + f.n;
  f.run([&](ThreadTeam team) { swiglu_row(team, y.data(), gate, up, f.n); });
  y.check_close(swiglu(f.arithmetic, gate_up.numbers()));
  f.run([&](ThreadTeam team) {
    swiglu_backward_row(team, dgate_up.data(), dgate_up.data() + f.n, dy.data(), gate, up, f.n);
  });
  dgate_up.check_close(swiglu_backward(f.arithmetic, dy.numbers(), gate_up.numbers()));
}

DISTILL_ROW_TEST("add_row, cast_row and the sums") {
  Rows<TestType> f;
  using C = Compute<TestType>;
  Row<TestType> a = f.row(), b = f.row(), sum = f.row(), narrow = f.row();
  Row<C> total = f.wide(), widened = f.wide();
  const Matrix x = a.numbers(), y = b.numbers(), before = total.numbers(), source = widened.numbers();
  std::vector<double> squares(std::size_t(f.lanes));  // each lane gets the sum
  f.run([&](ThreadTeam team) {
    add_row(team, sum.data(), a.data(), b.data(), f.n);
    cast_row(team, narrow.data(), widened.data(), f.n);
    accumulate_row(team, total.data(), a.data(), f.n);
    squares[std::size_t(team.lane())] = sum_of_squares_row(team, a.data(), f.n);
  });
  sum.check_close(reference::matrix(1, f.n, [&](auto, auto i) { return f.arithmetic.add(x(0, i), y(0, i)); }));
  narrow.check_close(source);
  total.check_close(reference::matrix(1, f.n, [&](auto, auto i) { return f.arithmetic.add(before(0, i), x(0, i)); }));
  double expected = 0;
  for (std::int64_t i = 0; i < f.n; ++i) expected += x(0, i).value * x(0, i).value;
  for (const double found : squares) CHECK(found == Approx(expected).epsilon(1e-14));
}

DISTILL_ROW_TEST("adamw_row") {
  Rows<TestType> f;
  using C = Compute<TestType>;
  AdamWStep step{.lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8, .weight_decay = 0.1, .grad_scale = 0.5};
  step.bias_correction1 = 1 - step.beta1;
  step.bias_correction2 = 1 - step.beta2;
  Row<TestType> narrow = f.row();
  Row<C> weight = f.wide(), m = f.wide(), v = f.wide(0.1, 1), grad = f.wide();
  const bool has_narrow = GENERATE(false, true);
  const Matrix w0 = weight.numbers(), m0 = m.numbers(), v0 = v.numbers(), g = grad.numbers();
  f.run([&](ThreadTeam team) {
    adamw_row(team, has_narrow ? narrow.data() : nullptr, weight.data(), m.data(), v.data(), grad.data(), f.n,
              AdamWFactors<C>(step));
  });
  Matrix w1(1, f.n), m1(1, f.n), v1(1, f.n);
  for (std::int64_t i = 0; i < f.n; ++i) {
    const auto next = reference::adamw(f.arithmetic, {w0(0, i), m0(0, i), v0(0, i)}, g(0, i), step);
    w1(0, i) = next.weight;
    m1(0, i) = next.m;
    v1(0, i) = next.v;
  }
  weight.check_close(w1);
  if (has_narrow) narrow.check_close(w1);
  m.check_close(m1);
  v.check_close(v1);
}

}  // namespace
}  // namespace distill
