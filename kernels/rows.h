// Row maths, once for every backend and for the tests: the lanes of a Team share a row. T is what memory holds,
// Compute<T> what is calculated in. Vectorised copies for the CPU: cpu/row_functions.cpp.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/device.h"
#include "kernels/team.h"

namespace distill {

// y = round(x / rms(x)) · w, rms(x) = √(mean x² + eps), rounded to T as transformers does: an element, and the row.
template <class C>
DISTILL_HD C inverse_rms_of(C squares, std::int64_t n, float eps) {
  return C(1) / std::sqrt(squares / C(n) + C(eps));
}
template <class T>
DISTILL_HD T normed(T x, Compute<T> inv, T w) {
  using C = Compute<T>;
  return T(C(T(C(x) * inv)) * C(w));
}
template <class Team, class T>
DISTILL_HD void rms_norm_row(Team team, T* y, Compute<T>* inv_rms, const T* x, const T* w, std::int64_t n, float eps) {
  using C = Compute<T>;
  C squares = 0;
  for (std::int64_t i = team.lane(); i < n; i += team.lanes()) squares += C(x[i]) * C(x[i]);
  const C inv = inverse_rms_of(team.sum(squares), n, eps);
  if (team.lane() == 0) *inv_rms = inv;
  for (std::int64_t i = team.lane(); i < n; i += team.lanes()) y[i] = normed(x[i], inv, w[i]);
}

// sum = x + delta, y = rms_norm_row(sum). A lane reads back only what it wrote.
template <class Team, class T>
DISTILL_HD void add_rms_norm_row(Team team, T* sum, T* y, Compute<T>* inv_rms, const T* x, const T* delta, const T* w,
                                 std::int64_t n, float eps) {
  using C = Compute<T>;
  for (std::int64_t i = team.lane(); i < n; i += team.lanes()) sum[i] = T(C(x[i]) + C(delta[i]));
  rms_norm_row(team, y, inv_rms, sum, w, n, eps);
}

// With h = x·inv: dx_i = inv (dy_i w_i − h_i Σ_j dy_j w_j h_j / n) + dskip_i, dw_i += dy_i h_i. dskip may be null; dx
// may be dy or dskip.
template <class Team, class T>
DISTILL_HD void rms_norm_backward_row(Team team, T* dx, Compute<T>* dw, const T* dy, const T* dskip, const T* x,
                                      const T* w, Compute<T> inv, std::int64_t n) {
  using C = Compute<T>;
  C dot = 0;
  for (std::int64_t i = team.lane(); i < n; i += team.lanes()) dot += C(dy[i]) * C(w[i]) * C(x[i]);
  const C along = team.sum(dot) * inv * inv / C(n);
  for (std::int64_t i = team.lane(); i < n; i += team.lanes()) {
    const C d = C(dy[i]), value = inv * (d * C(w[i]) - C(x[i]) * along);
    dw[i] += d * C(x[i]) * inv;
    dx[i] = T(dskip ? value + C(dskip[i]) : value);
  }
}

// Turns the pairs (i, i + D/2) of each head by the angles of one position (Su et al. 2021, in the layout of
// transformers); table [D] = cosines | sines.
template <class Team, class T>
DISTILL_HD void rope_row(Team team, T* x, const Compute<T>* table, std::int64_t heads, int head_dim, bool inverse) {
  using C = Compute<T>;
  const int half = head_dim / 2;
  for (std::int64_t j = team.lane(); j < heads * half; j += team.lanes()) {
    const std::int64_t i = j % half;
    T *first = x + j / half * head_dim + i, *second = first + half;
    const C a = C(*first), b = C(*second), cosine = table[i], sine = inverse ? -table[half + i] : table[half + i];
    *first = T(a * cosine - b * sine);
    *second = T(b * cosine + a * sine);
  }
}

// y = silu(gate) · up
template <class Team, class T>
DISTILL_HD void swiglu_row(Team team, T* y, const T* gate, const T* up, std::int64_t n) {
  using C = Compute<T>;
  for (std::int64_t i = team.lane(); i < n; i += team.lanes()) {
    const C g = C(gate[i]);
    y[i] = T(g / (C(1) + std::exp(-g)) * C(up[i]));
  }
}

// With s = 1/(1 + e^−g): dgate = dy · up · s (1 + g (1 − s)), dup = dy · g s.
template <class Team, class T>
DISTILL_HD void swiglu_backward_row(Team team, T* dgate, T* dup, const T* dy, const T* gate, const T* up,
                                    std::int64_t n) {
  using C = Compute<T>;
  for (std::int64_t i = team.lane(); i < n; i += team.lanes()) {
    const C g = C(gate[i]), u = C(up[i]), d = C(dy[i]), s = C(1) / (C(1) + std::exp(-g));
    dgate[i] = T(d * u * s * (C(1) + g * (C(1) - s)));
    dup[i] = T(d * g * s);
  }
}

template <class Team, class T>
DISTILL_HD void add_row(Team team, T* sum, const T* a, const T* b, std::int64_t n) {
  using C = Compute<T>;
  for (std::int64_t i = team.lane(); i < n; i += team.lanes()) sum[i] = T(C(a[i]) + C(b[i]));
}

template <class Team, class To, class From>
DISTILL_HD void cast_row(Team team, To* to, const From* from, std::int64_t n) {
  for (std::int64_t i = team.lane(); i < n; i += team.lanes()) to[i] = To(Compute<To>(Compute<From>(from[i])));
}

// sum += x
template <class Team, class S, class T>
DISTILL_HD void accumulate_row(Team team, S* sum, const T* x, std::int64_t n) {
  for (std::int64_t i = team.lane(); i < n; i += team.lanes()) sum[i] += S(Compute<T>(x[i]));
}

template <class Team, class T>
DISTILL_HD double sum_of_squares_row(Team team, const T* x, std::int64_t n) {
  double sum = 0;
  for (std::int64_t i = team.lane(); i < n; i += team.lanes())
    sum += double(Compute<T>(x[i])) * double(Compute<T>(x[i]));
  return team.sum(sum);
}

// An AdamW step as the factors an element needs.
template <class C>
struct AdamWFactors {
  C grad_scale, keep, rate, inv_root, epsilon, beta2, one_minus_beta1, one_minus_beta2;
  explicit AdamWFactors(const AdamWStep& s)
      : grad_scale(C(s.grad_scale)),
        keep(C(1 - s.lr * s.weight_decay)),
        rate(C(s.lr / s.bias_correction1)),
        inv_root(C(1 / std::sqrt(s.bias_correction2))),
        epsilon(C(s.epsilon)),
        beta2(C(s.beta2)),
        one_minus_beta1(C(1 - s.beta1)),
        one_minus_beta2(C(1 - s.beta2)) {}
};

// weight = weight (1 − lr·decay) − lr/bc1 · m / (√v/√bc2 + ε); narrow, where there is one, is its copy in T.
template <class Team, class T, class C = Compute<T>>
DISTILL_HD void adamw_row(Team team, T* narrow, C* weight, C* m, C* v, const C* grad, std::int64_t n,
                          const AdamWFactors<C>& f) {
  for (std::int64_t i = team.lane(); i < n; i += team.lanes()) {
    const C g = grad[i] * f.grad_scale;
    m[i] += f.one_minus_beta1 * (g - m[i]);
    v[i] = v[i] * f.beta2 + f.one_minus_beta2 * g * g;
    weight[i] = weight[i] * f.keep - f.rate * m[i] / (std::sqrt(v[i]) * f.inv_root + f.epsilon);
    if (narrow) narrow[i] = T(weight[i]);
  }
}

}  // namespace distill
