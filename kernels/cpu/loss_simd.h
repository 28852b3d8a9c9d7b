// The loss passes of loss_rows.h in vector code, for f32 students: one row of the chunk at a time, block by block so
// that what a pass converts stays in the first-level cache. Chosen at run time among the instruction sets of the
// machine.
#pragma once

#include <bit>
#include <cstdint>
#include <span>
#include <vector>

#include "core/distill/loss_spec.h"
#include "core/number.h"

namespace distill::simd {

// The columns of one position that take part.
struct Row {
  const float* student = nullptr;
  const void* teacher = nullptr;  // null: no teacher
  DType teacher_type = DType::f32;
  std::int64_t columns = 0;
  float student_scale = 1, teacher_scale = 1;  // 1/τ, 1/(τ τ_t)
  std::span<const std::int32_t> holes = {};    // ascending: columns left out
};

// Units as in loss_rows.h: a = (s − max s)/τ, b = (t − max t)/(τ τ_t).
struct RowSums {
  double student_max = -1e9, teacher_max = -1e9;  // raw
  double plain = 0;                               // Σ exp(s − max s)
  double student = 0, student_dot = 0;            // Σ exp(a), Σ exp(a) a
  double teacher = 0, teacher_dot = 0;            // Σ exp(b), Σ exp(b) b
  double teacher_square = 0;                      // Σ exp(b) b²
  double forward = 0, reverse = 0;                // Σ exp(b) (b − a), Σ exp(a) (a − b)
  bool agreement = false;                         // one column holds both maxima

  // The sums as if the maxima were these larger ones.
  void recentre(double new_student_max, double new_teacher_max, double student_scale, double teacher_scale);
  void merge(RowSums other, double student_scale, double teacher_scale);
  bool finite() const;
};

// Reads each logit once. Cross sums and the square are formed only when asked for.
enum class CrossSums { none, forward, reverse, all };
RowSums row_sums(const Row& row, CrossSums cross);

// Grow-only memory of one thread.
struct Scratch {
  std::vector<float> distance, mass, gap, slope, probability, group_maxima, kept_student, kept_teacher, kept_gradient;
  std::vector<std::uint64_t> candidates, order;
  std::vector<std::int32_t> ids;
};

// adaptive_kl: Σ |q − p| over the head and over the tail of q (rule in loss_rows.h, settled()).
struct HeadTailGaps {
  double head = 0, tail = 0;
};
HeadTailGaps head_tail_gaps(const Row& row, const RowSums& sums, double alpha, Scratch& scratch);

// The same search in steps, for a row that is cut over ranks: between two steps the sums of all ranks are added up.
constexpr int pivots = 4;

// Σ q and Σ |q − p| over the entries at least as far from the largest logit as each pivot; Σ |q − p| over all.
struct PivotSums {
  double mass[pivots] = {}, gap[pivots] = {}, total_gap = 0;
};
// First pivots, from the sums of the whole row: CrossSums::all.
void first_pivots(float* at, const RowSums& sums, double alpha);
PivotSums pivot_sums(const Row& row, const RowSums& sums, const float* at);

// The interval [near, far) of distances where the head ends: the mass from `near` on exceeds α (or near is 0), the mass
// from `far` on does not.
struct Boundary {
  static constexpr int bins = 256;

  float near = 0, far = 1e29f;  // further from the largest logit than any real one
  double far_gap = 0, far_mass = 0;

  void narrow(const float* at, const PivotSums& sums, double alpha);
  // mass, gap: what add_histogram() gives.
  void narrow(const double* mass, const double* gap, double alpha);
  bool found() const { return width() <= 1; }
  // Floats in the interval: equal steps in their bits divide it, whatever the distribution.
  std::int32_t width() const { return std::bit_cast<std::int32_t>(far) - std::bit_cast<std::int32_t>(near); }
  void spread(float* at) const;
  // The bin of a distance of the interval is the number of floats from `near` to it >> bin_shift().
  int bin_shift() const;
};
// Adds Σ q and Σ |q − p| over the entries of the interval by their bin.
void add_histogram(double* mass, double* gap, const Row& row, const RowSums& sums, const Boundary& boundary);

struct DivergenceSums {
  double value = 0, slope = 0;
};
// For any objective of core/distill/divergence.h but adaptive_kl, from its value() and slope(). Leaves slope and p of
// every column in the scratch memory for general_gradient().
DivergenceSums divergence_sums(const Row& row, const RowSums& sums, const LossSpec& spec, Scratch& scratch);

// What the gradient pass writes beside the columns.
struct GradientOut {
  void* dlogits = nullptr;
  DType type = DType::f32;
  std::int64_t padded = 0;  // columns written: zeros from row.columns on
  bool stream = false;      // past the caches
  // These columns get these values instead (ascending), then `label` gets `label_gradient` added; −1: none.
  std::span<const std::int32_t> ids = {};
  std::span<const float> values = {};
  std::int64_t label = -1;
  float label_gradient = 0;
};

// g = exp(a) (p0 + p1 (a − b + shift)) − exp(b) q0 + exp(s − max s) plain: cross-entropy, both KL divergences and their
// mixtures. The bracket is a difference of what may be large numbers, so p0 stays out of it.
struct LinearGradient {
  float p0 = 0, p1 = 0, shift = 0, q0 = 0, plain = 0;
};
void linear_gradient(const GradientOut& out, const Row& row, const RowSums& sums, const LinearGradient& c);

// g = weight · slope + p · p0 + exp(s − max s) plain, slope and p from divergence_sums().
struct GeneralGradient {
  float weight = 0, p0 = 0, plain = 0;
};
void general_gradient(const GradientOut& out, const Row& row, const RowSums& sums, const GeneralGradient& c,
                      const Scratch& scratch);

// The ids of the teacher's k largest logits, ties to the lower id, ascending in scratch.ids; k < row.columns.
// False when NaN keeps them from being found.
bool find_topk(const Row& row, int k, Scratch& scratch);

}  // namespace distill::simd
