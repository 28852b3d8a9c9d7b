// Every operation of core/device.h as the textbook formula, in double, with the error a correct implementation may
// make.
//
// A Number carries a value and a bound of its rounding error to first order: each operation on numbers passes the
// errors of its operands on and adds one rounding of the type it is calculated in, unit roundoff u(C)·|result|; a sum
// of n terms adds n·u(C)·Σ|terms|, which covers every order of summation; keeping a number in memory of type T adds
// u(T)·|x| (Higham, Accuracy and Stability of Numerical Algorithms, chapters 3 and 4). So the tolerance of a test
// follows from the number type, the length of the reduction and the formula, and from nothing else.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/device.h"

namespace distill::reference {

// u: the largest relative error of one rounding to nearest. Below `tiny` it is an absolute error.
struct Rounding {
  double u, tiny;
};
inline Rounding rounding_of(DType type) {
  switch (type) {
    case DType::f64:
      return {0x1p-53, 0x1p-1022};
    case DType::bf16:
      return {0x1p-8, 0x1p-126};
    case DType::f16:
      return {0x1p-11, 0x1p-25};
    default:
      return {0x1p-24, 0x1p-126};
  }
}

struct Number {
  double value = 0, error = 0;
  Number() = default;
  Number(double exact) : value(exact) {}
  Number(double v, double e) : value(v), error(e) {}
};

// A sum in the making.
struct Sum {
  double value = 0, error = 0, magnitude = 0, count = 0;
  void add(const Number& x) {
    value += x.value;
    error += x.error;
    magnitude += std::abs(x.value);
    ++count;
  }
};

// What was made of logarithms and sines of f64, which may be wrong by 8 units together.
inline Number by_functions_of_double(double x) { return {x, 8 * rounding_of(DType::f64).u * std::abs(x)}; }

// Arithmetic of a device that calculates in the wide type of T.
class Arithmetic {
 public:
  explicit Arithmetic(DType stored) : stored_(rounding_of(stored)), computed_(rounding_of(wide_type(stored))) {}

  // A constant that the device holds in its own precision.
  Number constant(double x) const { return computed(x, 0); }
  Number add(const Number& a, const Number& b) const { return computed(a.value + b.value, a.error + b.error); }
  Number sub(const Number& a, const Number& b) const { return computed(a.value - b.value, a.error + b.error); }
  Number mul(const Number& a, const Number& b) const {
    return computed(a.value * b.value, std::abs(a.value) * b.error + std::abs(b.value) * a.error + a.error * b.error);
  }
  Number div(const Number& a, const Number& b) const {
    const double value = a.value / b.value;
    return computed(value, (a.error + std::abs(value) * b.error) / std::abs(b.value));
  }
  Number sqrt(const Number& a) const {
    const double value = std::sqrt(a.value);
    return computed(value, value > 0 ? a.error / (2 * value) : 0);
  }
  // Implementations of exp and log may be wrong by 8 units.
  Number exp(const Number& a) const {
    const double value = std::exp(a.value);
    return {value, value * (std::expm1(a.error) + 8 * computed_.u) + computed_.tiny};
  }
  Number log(const Number& a) const {
    const double value = std::log(a.value);
    return {value, a.error / a.value + 8 * computed_.u * std::abs(value) + computed_.u};
  }
  // Σ terms, in any order and any grouping.
  Number sum(const std::vector<Number>& terms) const {
    Sum sum;
    for (const Number& term : terms) sum.add(term);
    return total(sum);
  }
  Number total(const Sum& s) const { return {s.value, s.error + s.count * computed_.u * s.magnitude + computed_.tiny}; }
  // a and b: n numbers each
  Number dot(const Number* a, const Number* b, std::int64_t n) const {
    Sum sum;
    for (std::int64_t i = 0; i < n; ++i) sum.add(mul(a[i], b[i]));
    return total(sum);
  }
  // x after a stay in memory of type T, or of any type.
  Number kept(const Number& x) const { return rounded(x, stored_); }
  static Number kept_as(const Number& x, DType type) { return rounded(x, rounding_of(type)); }

 private:
  static Number rounded(const Number& x, const Rounding& to) {
    return {x.value, x.error + to.u * (std::abs(x.value) + x.error) + to.tiny};
  }
  Number computed(double value, double error) const { return rounded({value, error}, computed_); }

  Rounding stored_, computed_;
};

// A matrix of numbers, row by row.
struct Matrix {
  std::int64_t rows = 0, cols = 0;
  std::vector<Number> values;
  Matrix() = default;
  Matrix(std::int64_t r, std::int64_t c) : rows(r), cols(c), values(std::size_t(r * c)) {}
  Number& operator()(std::int64_t r, std::int64_t c) { return values[std::size_t(r * cols + c)]; }
  const Number& operator()(std::int64_t r, std::int64_t c) const { return values[std::size_t(r * cols + c)]; }
  const Number* at(std::int64_t r, std::int64_t c) const { return values.data() + r * cols + c; }
};

// value(r, c) for each element.
template <class F>
Matrix matrix(std::int64_t rows, std::int64_t cols, F value) {
  Matrix m(rows, cols);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < cols; ++c) m(r, c) = value(r, c);
  return m;
}
inline Matrix transpose(const Matrix& m) {
  return matrix(m.cols, m.rows, [&](auto r, auto c) { return m(c, r); });
}
inline Matrix columns(const Matrix& m, std::int64_t first, std::int64_t count) {
  return matrix(m.rows, count, [&](auto r, auto c) { return m(r, first + c); });
}
inline Matrix kept(const Matrix& m, DType type) {
  return matrix(m.rows, m.cols, [&](auto r, auto c) { return Arithmetic::kept_as(m(r, c), type); });
}

// a b (+ c)
inline Matrix product(const Arithmetic& n, const Matrix& a, const Matrix& b, const Matrix* c = nullptr) {
  return matrix(a.rows, b.cols, [&](auto i, auto j) {
    Sum sum;
    for (std::int64_t k = 0; k < a.cols; ++k) sum.add(n.mul(a(i, k), b(k, j)));
    if (c) sum.add((*c)(i, j));
    return n.total(sum);
  });
}

// --- root mean square norm over groups of w.cols columns

inline Matrix inverse_rms(const Arithmetic& n, const Matrix& x, std::int64_t width, double eps) {
  return matrix(x.rows, x.cols / width, [&](auto r, auto g) {
    std::vector<Number> squares;
    for (std::int64_t i = 0; i < width; ++i) squares.push_back(n.mul(x(r, g * width + i), x(r, g * width + i)));
    return n.div(1, n.sqrt(n.add(n.div(n.sum(squares), double(width)), eps)));
  });
}

inline Matrix rms_norm(const Arithmetic& n, const Matrix& x, const Matrix& w, double eps) {
  const Matrix inv = inverse_rms(n, x, w.cols, eps);
  return matrix(x.rows, x.cols,
                [&](auto r, auto i) { return n.mul(n.kept(n.mul(x(r, i), inv(r, i / w.cols))), w(0, i % w.cols)); });
}

// y_i = h_i w_i, h_i = x_i inv, inv = (Σx²/n + eps)^−½: ∂y_j/∂x_i = w_j (δ_ij inv − x_i x_j inv³ / n).
struct NormGradients {
  Matrix dx, dw;
};
inline NormGradients rms_norm_backward(const Arithmetic& n, const Matrix& dy, const Matrix& x, const Matrix& w,
                                       const Matrix& inv, const Matrix& dw_before) {
  const std::int64_t width = w.cols;
  NormGradients out;
  const Matrix shares = matrix(x.rows, x.cols / width, [&](auto r, auto g) {
    std::vector<Number> along;
    for (std::int64_t j = 0; j < width; ++j)
      along.push_back(n.mul(n.mul(dy(r, g * width + j), w(0, j)), x(r, g * width + j)));
    return n.div(n.mul(n.mul(n.sum(along), inv(r, g)), inv(r, g)), double(width));
  });
  out.dx = matrix(x.rows, x.cols, [&](auto r, auto i) {
    const std::int64_t g = i / width;
    return n.mul(inv(r, g), n.sub(n.mul(dy(r, i), w(0, i % width)), n.mul(x(r, i), shares(r, g))));
  });
  out.dw = matrix(1, width, [&](auto, auto i) {
    std::vector<Number> terms = {dw_before(0, i)};
    for (std::int64_t r = 0; r < x.rows; ++r)
      for (std::int64_t g = 0; g < x.cols / width; ++g)
        terms.push_back(n.mul(n.mul(dy(r, g * width + i), x(r, g * width + i)), inv(r, g)));
    return n.sum(terms);
  });
  return out;
}

// --- rotary embedding; table row = cosines | sines

inline Matrix rope(const Arithmetic& n, const Matrix& x, const std::vector<std::int32_t>& positions,
                   const Matrix& table, int head_dim, bool inverse) {
  const int half = head_dim / 2;
  return matrix(x.rows, x.cols, [&](auto r, auto c) {
    const std::int64_t i = c % half, start = c / head_dim * head_dim;
    const Number a = x(r, start + i), b = x(r, start + half + i), cosine = table(positions[std::size_t(r)], i);
    Number sine = table(positions[std::size_t(r)], half + i);
    if (inverse) sine.value = -sine.value;
    return c % head_dim < half ? n.sub(n.mul(a, cosine), n.mul(b, sine)) : n.add(n.mul(b, cosine), n.mul(a, sine));
  });
}

// --- gate

inline Number sigmoid(const Arithmetic& n, const Number& g) {
  return n.div(1, n.add(1, n.exp(Number(-g.value, g.error))));
}
inline Matrix swiglu(const Arithmetic& n, const Matrix& gate_up) {
  const std::int64_t width = gate_up.cols / 2;
  return matrix(gate_up.rows, width, [&](auto r, auto i) {
    const Number g = gate_up(r, i);
    return n.mul(n.mul(g, sigmoid(n, g)), gate_up(r, width + i));
  });
}
inline Matrix swiglu_backward(const Arithmetic& n, const Matrix& dy, const Matrix& gate_up) {
  const std::int64_t width = dy.cols;
  return matrix(dy.rows, 2 * width, [&](auto r, auto c) {
    const std::int64_t i = c % width;
    const Number g = gate_up(r, i), s = sigmoid(n, g), up = gate_up(r, width + i), d = dy(r, i);
    if (c >= width) return n.mul(d, n.mul(g, s));
    return n.mul(n.mul(n.mul(d, up), s), n.add(1, n.mul(g, n.sub(1, s))));
  });
}

// --- causal attention of one packed batch. Probabilities and their gradients may be kept in T on the way.

struct Attention {
  Matrix out, log_sum;
};
struct AttentionGradients {
  Matrix dq, dk, dv;
};

class AttentionFormula {
 public:
  AttentionFormula(const Arithmetic& n, const Matrix& q, const Matrix& k, const Matrix& v,
                   const std::vector<std::int32_t>& offsets, const AttentionShape& shape)
      : n_(n), q_(q), k_(k), v_(v), offsets_(offsets), shape_(shape) {}

  Attention forward() const {
    Attention result{Matrix(q_.rows, q_.cols), Matrix(q_.rows, shape_.q_heads)};
    for_queries([&](std::int64_t i, int head, std::int64_t first) {
      const std::vector<Number> scores = scores_of(i, head, first);
      double largest = scores.front().value;
      for (const Number& s : scores) largest = std::max(largest, s.value);
      Sum exponentials;
      std::vector<Sum> sums(std::size_t(shape_.head_dim));
      for (std::size_t j = 0; j < scores.size(); ++j) {
        const Number e = n_.exp(n_.sub(scores[j], largest)), kept = n_.kept(e);
        const Number* value = v_.at(first + std::int64_t(j), kv_column(head));
        exponentials.add(e);
        for (int c = 0; c < shape_.head_dim; ++c) sums[std::size_t(c)].add(n_.mul(kept, value[c]));
      }
      const Number sum = n_.total(exponentials);
      result.log_sum(i, head) = n_.add(largest, n_.log(sum));
      for (int c = 0; c < shape_.head_dim; ++c)
        result.out(i, head * shape_.head_dim + c) = n_.div(n_.total(sums[std::size_t(c)]), sum);
    });
    return result;
  }

  // Given what the forward kept: P = exp(S − log_sum), dP = dO Vᵀ, dS = scale · P ∘ (dP − Σ dO ∘ O);
  // dQ = dS K, dK = dSᵀ Q, dV = Pᵀ dO.
  AttentionGradients backward(const Matrix& dout, const Matrix& out, const Matrix& log_sum) const {
    std::vector<Sum> dq(q_.values.size()), dk(k_.values.size()), dv(v_.values.size());
    const int d = shape_.head_dim;
    for_queries([&](std::int64_t i, int head, std::int64_t first) {
      const std::vector<Number> scores = scores_of(i, head, first);
      const Number *query = q_.at(i, head * d), *grad = dout.at(i, head * d);
      const Number delta = n_.dot(grad, out.at(i, head * d), d);
      Sum* dquery = &dq[std::size_t(i * q_.cols + head * d)];
      for (std::size_t s = 0; s < scores.size(); ++s) {
        const std::int64_t j = first + std::int64_t(s), column = kv_column(head);
        const Number p = n_.exp(n_.sub(scores[s], log_sum(i, head))), kept = n_.kept(p);
        const Number dp = n_.dot(grad, v_.at(j, column), d);
        const Number ds = n_.kept(n_.mul(n_.mul(double(shape_.scale), p), n_.sub(dp, delta)));
        Sum *dkey = &dk[std::size_t(j * k_.cols + column)], *dvalue = &dv[std::size_t(j * v_.cols + column)];
        for (int c = 0; c < d; ++c) {
          dquery[c].add(n_.mul(ds, k_.at(j, column)[c]));
          dkey[c].add(n_.mul(ds, query[c]));
          dvalue[c].add(n_.mul(kept, grad[c]));
        }
      }
    });
    const auto totals = [&](const Matrix& like, const std::vector<Sum>& sums) {
      return matrix(like.rows, like.cols,
                    [&](auto r, auto c) { return n_.total(sums[std::size_t(r * like.cols + c)]); });
    };
    return {totals(q_, dq), totals(k_, dk), totals(v_, dv)};
  }

 private:
  // The first column of k and v that belongs to a query head.
  std::int64_t kv_column(int head) const {
    return std::int64_t(head / (shape_.q_heads / shape_.kv_heads)) * shape_.head_dim;
  }
  // Scores of query i against keys first, first + 1, …, i.
  std::vector<Number> scores_of(std::int64_t i, int head, std::int64_t first) const {
    std::vector<Number> scores;
    const Number* query = q_.at(i, std::int64_t(head) * shape_.head_dim);
    for (std::int64_t j = first; j <= i; ++j)
      scores.push_back(n_.mul(double(shape_.scale), n_.dot(query, k_.at(j, kv_column(head)), shape_.head_dim)));
    return scores;
  }
  template <class Body>
  void for_queries(Body body) const {
    for (std::size_t s = 0; s + 1 < offsets_.size(); ++s)
      for (std::int64_t i = offsets_[s]; i < offsets_[s + 1]; ++i)
        for (int head = 0; head < shape_.q_heads; ++head) {
          const std::int64_t begin = offsets_[s];
          body(i, head, shape_.window > 0 ? std::max(begin, i - shape_.window + 1) : begin);
        }
  }

  Arithmetic n_;
  const Matrix &q_, &k_, &v_;
  std::vector<std::int32_t> offsets_;
  AttentionShape shape_;
};

// --- AdamW (Loshchilov & Hutter 2019, algorithm 2, as torch.optim.AdamW)

struct AdamWState {
  Number weight, m, v;
};
inline AdamWState adamw(const Arithmetic& n, const AdamWState& s, const Number& gradient, const AdamWStep& step) {
  const Number beta1 = n.constant(step.beta1), rest1 = n.constant(1 - step.beta1), beta2 = n.constant(step.beta2),
               rest2 = n.constant(1 - step.beta2);
  const Number g = n.mul(gradient, n.constant(step.grad_scale));
  AdamWState next;
  next.m = n.add(n.mul(beta1, s.m), n.mul(rest1, g));
  next.v = n.add(n.mul(beta2, s.v), n.mul(rest2, n.mul(g, g)));
  const Number root =
      n.add(n.div(n.sqrt(next.v), n.constant(std::sqrt(step.bias_correction2))), n.constant(step.epsilon));
  next.weight = n.sub(n.mul(s.weight, n.constant(1 - step.lr * step.weight_decay)),
                      n.div(n.mul(n.constant(step.lr / step.bias_correction1), next.m), root));
  return next;
}

}  // namespace distill::reference
