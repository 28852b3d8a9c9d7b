// What the loss is: objective, temperatures, mix, top-k. Formulas and rules: README of core/, "Loss".
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace distill {

enum class Objective { forward_kl, reverse_kl, adaptive_kl, skewed_forward_kl, skewed_reverse_kl, js_divergence };
inline constexpr std::array<std::string_view, 6> objective_names = {
    "forward_kl", "reverse_kl", "adaptive_kl", "skewed_forward_kl", "skewed_reverse_kl", "js_divergence"};

// Restriction of the divergence to the teacher's k largest entries S.
enum class TopkMode {
  renormalize,  // both sides renormalised over S
  tail          // full-vocabulary probabilities on S plus one bucket for the rest
};
inline constexpr std::array<std::string_view, 2> topk_mode_names = {"renormalize", "tail"};

struct LossSpec {
  Objective objective = Objective::forward_kl;
  float distill_weight = 0.5f;    // w of (1−w)·CE + w·D; 0: no teacher
  float temperature = 1;          // τ: p = softmax(s/τ), q = softmax(t/(τ·τ_t)); no τ² factor
  float teacher_temperature = 1;  // τ_t
  float adaptive_alpha = 0.5f;    // adaptive_kl: share of q's mass below the threshold
  float skew_lambda = 0.1f;
  int topk = 0;  // 0: the whole vocabulary
  TopkMode topk_mode = TopkMode::renormalize;
  std::int64_t vocabulary = 0;  // real vocabulary: ids the tokenizer can produce; columns beyond it are excluded
};

class Communicator;

// The part of a cut vocabulary that lies here: column 0 of the student's and of the teacher's logits is id `first`. The
// ranks of `group` hold the whole in rank order; the real columns here, clamp(LossSpec::vocabulary − first, 0,
// columns), may be none. No group, or a group of one: the whole vocabulary is here.
struct VocabularyShard {
  std::int64_t first = 0;
  Communicator* group = nullptr;
};

// Columns of the per-position terms of Device::distill_loss.
struct LossTerms {
  enum Column {
    cross_entropy,    // −log softmax(s)[label], nats
    divergence,       // D(p, q), nats; 0 without a teacher
    student_entropy,  // of p, nats
    teacher_entropy,  // of q, nats
    top1_agreement,   // 1 when argmax s = argmax t (a tie of maxima counts when any is shared)
    topk_mass,        // Σ q over S before renormalisation; 1 without top-k
    count
  };
};

}  // namespace distill
