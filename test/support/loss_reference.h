// The loss of one position in double precision, written as the textbook formulas: sorts, closed gradients, no shared
// code with the product. README of core/, "Loss", has the rules.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/distill/loss_spec.h"

namespace distill::reference {

using Numbers = std::vector<double>;

struct Loss {
  double cross_entropy = 0, divergence = 0, student_entropy = 0, teacher_entropy = 0, top1_agreement = 0, topk_mass = 1;
  Numbers gradient;      // of (1−w) CE + w D
  double magnitude = 0;  // of what is subtracted in the gradient, to scale tolerances with
  double term(int column) const {
    const double terms[] = {cross_entropy, divergence, student_entropy, teacher_entropy, top1_agreement, topk_mass};
    return terms[column];
  }
};

inline Numbers readable(Numbers x) {
  for (double& v : x)
    if (v < -1e9) v = -1e9;
  return x;
}

inline double log_sum_exp(const Numbers& x) {
  const double most = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (const double v : x) sum += std::exp(v - most);
  return most + std::log(sum);
}

inline Numbers log_softmax(Numbers x, double temperature) {
  for (double& v : x) v /= temperature;
  const double normaliser = log_sum_exp(x);
  for (double& v : x) v -= normaliser;
  return x;
}

inline double entropy(const Numbers& log_p) {
  double sum = 0;
  for (const double lp : log_p) sum -= std::exp(lp) * lp;
  return sum;
}

inline double kl(const Numbers& log_p, const Numbers& log_q) {
  double sum = 0;
  for (std::size_t j = 0; j < log_p.size(); ++j) sum += std::exp(log_p[j]) * (log_p[j] - log_q[j]);
  return sum;
}

inline Numbers mixture(const Numbers& log_p, const Numbers& log_q, double weight_of_q) {
  Numbers m;
  for (std::size_t j = 0; j < log_p.size(); ++j) {
    const double most = std::max(log_p[j], log_q[j]);
    m.push_back(most +
                std::log(weight_of_q * std::exp(log_q[j] - most) + (1 - weight_of_q) * std::exp(log_p[j] - most)));
  }
  return m;
}

// Weight of the forward divergence.
inline double adaptive_head_weight(const Numbers& log_p, const Numbers& log_q, double alpha) {
  Numbers q;
  for (const double l : log_q) q.push_back(std::exp(l));
  Numbers ascending = q;
  std::sort(ascending.begin(), ascending.end());
  double threshold = ascending.back(), sum = 0;
  for (const double x : ascending) {
    sum += x;
    if (sum > alpha) {
      threshold = x;
      break;
    }
  }
  double head = 0, tail = 0;
  for (std::size_t j = 0; j < q.size(); ++j) (q[j] < threshold ? tail : head) += std::abs(q[j] - std::exp(log_p[j]));
  return head + tail < 1e-12 ? 0.5 : head / (head + tail);
}

struct Divergence {
  double value = 0;
  Numbers gradient;  // with respect to the tempered logits of p
};

inline Divergence divergence(const Numbers& lp, const Numbers& lq, const LossSpec& spec) {
  const std::size_t n = lp.size();
  Divergence d{0, Numbers(n)};
  const double lambda = spec.skew_lambda;
  const auto forward_gradient = [&](std::size_t j) { return std::exp(lp[j]) - std::exp(lq[j]); };
  const double reverse = kl(lp, lq);
  const auto reverse_gradient = [&](std::size_t j) { return std::exp(lp[j]) * (lp[j] - lq[j] - reverse); };
  switch (spec.objective) {
    case Objective::forward_kl:
      d.value = kl(lq, lp);
      for (std::size_t j = 0; j < n; ++j) d.gradient[j] = forward_gradient(j);
      break;
    case Objective::reverse_kl:
      d.value = reverse;
      for (std::size_t j = 0; j < n; ++j) d.gradient[j] = reverse_gradient(j);
      break;
    case Objective::adaptive_kl: {
      const double head = adaptive_head_weight(lp, lq, spec.adaptive_alpha);
      d.value = head * kl(lq, lp) + (1 - head) * reverse;
      for (std::size_t j = 0; j < n; ++j) d.gradient[j] = head * forward_gradient(j) + (1 - head) * reverse_gradient(j);
      break;
    }
    case Objective::skewed_forward_kl: {
      const Numbers lm = mixture(lp, lq, lambda);
      d.value = kl(lq, lm);
      double r = 0;
      for (std::size_t j = 0; j < n; ++j) r += std::exp(lp[j] + lq[j] - lm[j]);
      for (std::size_t j = 0; j < n; ++j)
        d.gradient[j] = (1 - lambda) * (std::exp(lp[j]) * r - std::exp(lp[j] + lq[j] - lm[j]));
      break;
    }
    case Objective::skewed_reverse_kl: {
      const Numbers lm = mixture(lp, lq, 1 - lambda);
      d.value = kl(lp, lm);
      const auto g = [&](std::size_t j) { return lp[j] - lm[j] - lambda * std::exp(lp[j] - lm[j]); };
      double mean = 0;
      for (std::size_t j = 0; j < n; ++j) mean += std::exp(lp[j]) * g(j);
      for (std::size_t j = 0; j < n; ++j) d.gradient[j] = std::exp(lp[j]) * (g(j) - mean);
      break;
    }
    case Objective::js_divergence: {
      const Numbers lm = mixture(lp, lq, 0.5);
      const double kl_p = kl(lp, lm);
      d.value = 0.5 * kl(lq, lm) + 0.5 * kl_p;
      for (std::size_t j = 0; j < n; ++j) d.gradient[j] = std::exp(lp[j]) * (lp[j] - lm[j] - kl_p) / 2;
      break;
    }
  }
  return d;
}

inline std::vector<std::size_t> topk_ids(const Numbers& t, std::size_t k) {
  std::vector<std::size_t> ids(t.size());
  std::iota(ids.begin(), ids.end(), std::size_t{0});
  std::stable_sort(ids.begin(), ids.end(), [&](std::size_t a, std::size_t b) { return t[a] > t[b]; });
  ids.resize(std::min(k, ids.size()));
  std::sort(ids.begin(), ids.end());
  return ids;
}

// student, teacher: logits of the real vocabulary; an empty teacher is none.
inline Loss loss(const Numbers& student, const Numbers& teacher, std::size_t label, const LossSpec& spec) {
  const Numbers s = readable(student), t = readable(teacher);
  const double tau = spec.temperature, w = spec.distill_weight;
  const std::size_t n = s.size();
  Loss out;
  const Numbers log_plain = log_softmax(s, 1), lp = log_softmax(s, tau);
  out.cross_entropy = -log_plain[label];
  out.student_entropy = entropy(lp);
  for (std::size_t j = 0; j < n; ++j) out.gradient.push_back((1 - w) * (std::exp(log_plain[j]) - (j == label ? 1 : 0)));
  if (t.empty()) return out;

  const Numbers lq = log_softmax(t, tau * double(spec.teacher_temperature));
  out.teacher_entropy = entropy(lq);
  const double most_s = *std::max_element(s.begin(), s.end()), most_t = *std::max_element(t.begin(), t.end());
  for (std::size_t j = 0; j < n; ++j)
    if (s[j] == most_s && t[j] == most_t) out.top1_agreement = 1;

  std::vector<std::size_t> kept(n);
  std::iota(kept.begin(), kept.end(), std::size_t{0});
  const bool is_cut = spec.topk > 0 && std::size_t(spec.topk) < n;
  if (is_cut) kept = topk_ids(t, std::size_t(spec.topk));
  Numbers kept_lp, kept_lq, rest_lp, rest_lq;
  for (std::size_t j = 0, i = 0; j < n; ++j) {
    const bool keeps = i < kept.size() && kept[i] == j;
    (keeps ? kept_lp : rest_lp).push_back(lp[j]);
    (keeps ? kept_lq : rest_lq).push_back(lq[j]);
    i += keeps;
  }
  if (is_cut) out.topk_mass = std::exp(log_sum_exp(kept_lq));
  const bool has_bucket = is_cut && spec.topk_mode == TopkMode::tail;
  if (has_bucket) {
    kept_lp.push_back(log_sum_exp(rest_lp));
    kept_lq.push_back(log_sum_exp(rest_lq));
  } else if (is_cut) {
    kept_lp = log_softmax(kept_lp, 1);
    kept_lq = log_softmax(kept_lq, 1);
  }
  const Divergence d = divergence(kept_lp, kept_lq, spec);
  out.divergence = d.value;
  for (std::size_t j = 0, i = 0; j < n; ++j) {
    const bool keeps = i < kept.size() && kept[i] == j;
    if (keeps)
      out.gradient[j] += w * d.gradient[i] / tau;
    else if (has_bucket)
      out.gradient[j] += w * d.gradient.back() / tau * std::exp(lp[j] - kept_lp.back());
    i += keeps;
  }
  for (const double l : kept_lp) out.magnitude = std::max(out.magnitude, std::exp(l));
  for (const double l : kept_lq) out.magnitude = std::max(out.magnitude, std::exp(l));
  out.magnitude *= std::max(1.0, d.value);
  return out;
}

}  // namespace distill::reference
