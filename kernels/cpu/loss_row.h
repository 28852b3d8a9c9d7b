// The loss of one position by vector code, given sums over the whole vocabulary: where they come from, one row or the
// rows of all ranks, is the caller's business.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "core/distill/loss_spec.h"
#include "core/tensor.h"
#include "kernels/cpu/loss.h"
#include "kernels/loss_rows.h"

namespace distill {

// The rows of one call of distill_loss_cpu and the columns of the real vocabulary here.
struct LossCall {
  View dlogits, terms;
  ConstView student, teacher, labels;
  const LossSpec& spec;
  float scale;
  int threads;
  std::int64_t first, columns;

  bool has_teacher() const { return teacher.rows > 0; }
  std::int64_t label(std::int64_t r) const { return labels.as<std::int32_t>()[r]; }
  static const void* bytes_of(const ConstView& v, std::int64_t r) {
    return static_cast<const char*>(v.data) + r * v.stride * std::int64_t(size_of(v.dtype));
  }

  simd::Row row(std::int64_t r) const {
    simd::Row row;
    row.student = static_cast<const float*>(bytes_of(student, r));
    row.columns = columns;
    row.student_scale = float(1 / double(spec.temperature));
    row.teacher_scale = float(1 / (double(spec.temperature) * double(spec.teacher_temperature)));
    if (has_teacher()) {
      row.teacher = bytes_of(teacher, r);
      row.teacher_type = teacher.dtype;
    }
    return row;
  }
  simd::GradientOut gradient(std::int64_t r) const {
    // A gradient that no cache can hold until the head's products read it goes past them.
    constexpr std::size_t cache_bytes = std::size_t{16} << 20;
    simd::GradientOut out;
    out.dlogits = const_cast<void*>(bytes_of(dlogits, r));
    out.type = dlogits.dtype;
    out.padded = dlogits.cols;
    out.stream = std::size_t(dlogits.size()) * size_of(dlogits.dtype) > cache_bytes;
    out.label = label(r) - first;
    return out;
  }
  float* terms_of(std::int64_t r) const { return terms.as<float>() + r * terms.stride; }
};

// Whether D is restricted to some entries.
inline bool has_cut(const LossSpec& spec) { return spec.topk > 0 && spec.topk < spec.vocabulary; }

// D over the columns of one row, whole or the k that top-k kept: its value, then its gradient.
class RowDivergence {
 public:
  RowDivergence(const simd::Row& row, const simd::RowSums& sums, const LossSpec& spec, simd::Scratch& scratch,
                const DivergenceParts& parts)
      : row_(row), sums_(sums), scratch_(scratch), log_ratio_(std::log(sums.teacher) - std::log(sums.student)) {
    switch (spec.objective) {
      case Objective::forward_kl:
        forward_weight_ = 1;
        break;
      case Objective::reverse_kl:
        reverse_weight_ = 1;
        break;
      case Objective::adaptive_kl: {
        const auto [head, tail] = parts.gaps;
        forward_weight_ = head + tail < 1e-12 ? 0.5 : head / (head + tail);
        reverse_weight_ = 1 - forward_weight_;
        break;
      }
      default:
        value_ = parts.sums.value;
        slope_ = parts.sums.slope;
        return;
    }
    // Both KL divergences follow from the sums alone: log p − log q = (a − b) + log_ratio.
    is_linear_ = true;
    reverse_ = sums.reverse / sums.student + log_ratio_;
    if (forward_weight_ != 0) value_ += forward_weight_ * (sums.forward / sums.teacher - log_ratio_);
    if (reverse_weight_ != 0) value_ += reverse_weight_ * reverse_;
  }
  // All its columns are here.
  RowDivergence(const simd::Row& row, const simd::RowSums& sums, const LossSpec& spec, simd::Scratch& scratch)
      : RowDivergence(row, sums, spec, scratch, parts_of(row, sums, spec, scratch)) {}

  static simd::CrossSums needs(const LossSpec& spec) {
    switch (spec.objective) {
      case Objective::forward_kl:
        return simd::CrossSums::forward;
      case Objective::reverse_kl:
        return simd::CrossSums::reverse;
      case Objective::adaptive_kl:
        return simd::CrossSums::all;
      default:
        return simd::CrossSums::none;
    }
  }

  // For an objective that is not linear in its sums this leaves in the scratch memory what gradient() needs.
  static DivergenceParts parts_of(const simd::Row& row, const simd::RowSums& sums, const LossSpec& spec,
                                  simd::Scratch& scratch) {
    if (spec.objective == Objective::adaptive_kl)
      return {.gaps = simd::head_tail_gaps(row, sums, spec.adaptive_alpha, scratch)};
    if (needs(spec) == simd::CrossSums::none) return {.sums = simd::divergence_sums(row, sums, spec, scratch)};
    return {};
  }

  double value() const { return value_; }

  // weight · ∂D/∂a + ce_weight · softmax(s) for every column.
  void gradient(const simd::GradientOut& out, double weight, double ce_weight) const {
    const bool is_tempered = row_.student_scale != 1;
    const double plain = is_tempered ? ce_weight / sums_.plain : 0, same = is_tempered ? 0 : ce_weight;
    if (is_linear_) {
      simd::linear_gradient(out, row_, sums_,
                            {.p0 = float((weight * forward_weight_ + same) / sums_.student),
                             .p1 = float(weight * reverse_weight_ / sums_.student),
                             .shift = float(log_ratio_ - reverse_),
                             .q0 = float(weight * forward_weight_ / sums_.teacher),
                             .plain = float(plain)});
    } else {
      simd::general_gradient(out, row_, sums_,
                             {.weight = float(weight), .p0 = float(same - weight * slope_), .plain = float(plain)},
                             scratch_);
    }
  }

 private:
  const simd::Row& row_;
  const simd::RowSums& sums_;
  simd::Scratch& scratch_;
  double log_ratio_;
  bool is_linear_ = false;
  double forward_weight_ = 0, reverse_weight_ = 0;
  double reverse_ = 0;  // Σ p (log p − log q)
  double value_ = 0, slope_ = 0;
};

// One position of the chunk. A scale of 0 asks for the terms only. Sums that are passed in are over the whole
// vocabulary; the row may be a part of it.
class RowLoss {
 public:
  RowLoss(float* terms, const simd::GradientOut& out, const simd::Row& row, const LossSpec& spec, double scale,
          simd::Scratch& scratch)
      : terms_(terms),
        out_(out),
        row_(row),
        spec_(spec),
        scratch_(scratch),
        wants_gradient_(scale != 0),
        ce_weight_(scale * (1 - double(spec.distill_weight))),
        weight_(scale * double(spec.distill_weight) / spec.temperature) {
    out_.label_gradient = float(-ce_weight_);
    terms_[LossTerms::divergence] = terms_[LossTerms::teacher_entropy] = terms_[LossTerms::top1_agreement] = 0;
    terms_[LossTerms::topk_mass] = 1;
  }

  // Of a row that is the whole vocabulary.
  void run() {
    if (!row_.teacher) return cross_entropy_alone(sums_of(row_, simd::CrossSums::none));
    if (!has_cut(spec_)) {
      const PositionSums position = sums_of(row_, RowDivergence::needs(spec_));
      return whole_vocabulary(position,
                              [&] { return RowDivergence::parts_of(row_, position.columns, spec_, scratch_); });
    }
    const bool found = simd::find_topk(row_, spec_.topk, scratch_);
    if (!found) scratch_.ids.clear();
    simd::Row rest = row_;
    rest.holes = scratch_.ids;
    const PositionSums position = sums_of(rest, simd::CrossSums::none);
    gather_kept();
    top_k(found, position, 0);
  }

  // Of columns of this row and, if it is here, the label.
  PositionSums sums_of(const simd::Row& columns, simd::CrossSums cross) const {
    const bool has_label = out_.label >= 0 && out_.label < row_.columns;
    return {simd::row_sums(columns, cross), has_label ? double(readable(row_.student[out_.label])) : 0};
  }

  void cross_entropy_alone(const PositionSums& position) {
    const simd::RowSums& sums = position.columns;
    write_student_terms(sums, position.label_logit);
    const double p = ce_weight_ / sums.plain;
    simd::LinearGradient c;
    (is_tempered() ? c.plain : c.p0) = float(p);
    if (!sums.finite()) return not_finite();
    wants_gradient_ ? simd::linear_gradient(out_, row_, sums, c) : fill(0);
  }

  // parts() gives DivergenceParts over the whole vocabulary, asked for when all logits are finite.
  template <class Parts>
  void whole_vocabulary(const PositionSums& position, Parts&& parts) {
    const simd::RowSums& sums = position.columns;
    write_student_terms(sums, position.label_logit);
    write_teacher_terms(sums);
    if (!sums.finite()) return not_finite();
    const RowDivergence divergence(row_, sums, spec_, scratch_, parts());
    terms_[LossTerms::divergence] = float(divergence.value());
    wants_gradient_ ? divergence.gradient(out_, weight_, ce_weight_) : fill(0);
  }

  // The kept entries, and the bucket as one more, are a small row of their own; the others have a gradient in
  // proportion to their probability, from cross-entropy and from the bucket. All kept logits are in the scratch memory,
  // ids has the columns of those in this row: the first of them is number first_here of all. rest: sums over the
  // others.
  void top_k(bool found, const PositionSums& rest, std::size_t first_here) {
    const simd::RowSums& rest_sums = rest.columns;
    simd::Row kept = kept_row();
    simd::RowSums kept_sums = simd::row_sums(kept, simd::CrossSums::none);
    simd::RowSums all = rest_sums;
    all.merge(kept_sums, row_.student_scale, row_.teacher_scale);
    write_student_terms(all, rest.label_logit);
    write_teacher_terms(all);
    if (!found || !all.finite()) return not_finite();
    kept_sums.recentre(all.student_max, all.teacher_max, row_.student_scale, row_.teacher_scale);
    terms_[LossTerms::topk_mass] = float(kept_sums.teacher / all.teacher);

    const double bucket_gradient = kept_gradient(kept, rest_sums, all);
    if (!wants_gradient_) return fill(0);
    // Relative to the largest logit of the rest: the kept ones may be so far above that the rest would underflow.
    const double ce_rest = ce_weight_ / all.plain * std::exp(rest_sums.student_max - all.student_max);
    simd::LinearGradient c;
    (is_tempered() ? c.plain : c.p0) = float(ce_rest);
    c.p0 += float(bucket_gradient / rest_sums.student);
    out_.ids = scratch_.ids;
    out_.values = std::span<const float>(scratch_.kept_gradient).subspan(first_here, scratch_.ids.size());
    simd::linear_gradient(out_, row_, rest_sums, c);
  }

 private:
  // Fills scratch_.kept_gradient and the divergence; returns the gradient of the bucket, if there is one.
  double kept_gradient(simd::Row kept, const simd::RowSums& rest, const simd::RowSums& all) {
    const std::size_t k = scratch_.kept_student.size();
    auto& gradient = scratch_.kept_gradient;
    gradient.resize(2 * (k + 1));
    float* cross_entropy = gradient.data() + k + 1;
    simd::LinearGradient c;
    (is_tempered() ? c.plain : c.p0) = float(ce_weight_ / all.plain);
    simd::linear_gradient(buffer(cross_entropy, k), kept, all, c);

    centre(kept, all);
    if (spec_.topk_mode == TopkMode::tail) {
      const double shift_s = (rest.student_max - all.student_max) * row_.student_scale;
      const double shift_t = (rest.teacher_max - all.teacher_max) * row_.teacher_scale;
      scratch_.kept_student.push_back(float(shift_s + std::log(rest.student)));
      scratch_.kept_teacher.push_back(float(shift_t + std::log(rest.teacher)));
      ++kept.columns;
    }
    kept.student = scratch_.kept_student.data();
    kept.teacher = scratch_.kept_teacher.data();
    const simd::RowSums sums = simd::row_sums(kept, RowDivergence::needs(spec_));
    const RowDivergence divergence(kept, sums, spec_, scratch_);
    terms_[LossTerms::divergence] = float(divergence.value());
    divergence.gradient(buffer(gradient.data(), std::size_t(kept.columns)), weight_, 0);
    for (std::size_t i = 0; i < k; ++i) gradient[i] += cross_entropy[i];
    return spec_.topk_mode == TopkMode::tail ? double(gradient[k]) : 0;
  }

  void gather_kept() {
    scratch_.kept_student.clear();
    scratch_.kept_teacher.clear();
    with_float_type(row_.teacher_type, [&](auto type) {
      const auto* teacher = static_cast<const decltype(type)*>(row_.teacher);
      for (const std::int32_t id : scratch_.ids) {
        scratch_.kept_student.push_back(row_.student[id]);
        scratch_.kept_teacher.push_back(float(teacher[id]));
      }
    });
  }

  simd::Row kept_row() const {
    simd::Row kept = row_;
    kept.student = scratch_.kept_student.data();
    kept.teacher = scratch_.kept_teacher.data();
    kept.teacher_type = DType::f32;
    kept.columns = std::int64_t(scratch_.kept_student.size());
    return kept;
  }

  // The kept logits in units of a and b; `kept` then needs no temperature.
  void centre(simd::Row& kept, const simd::RowSums& all) {
    for (std::int64_t i = 0; i < kept.columns; ++i) {
      float& s = scratch_.kept_student[std::size_t(i)];
      float& t = scratch_.kept_teacher[std::size_t(i)];
      s = (readable(s) - float(all.student_max)) * row_.student_scale;
      t = (readable(t) - float(all.teacher_max)) * row_.teacher_scale;
    }
    kept.student_scale = kept.teacher_scale = 1;
  }

  static simd::GradientOut buffer(float* to, std::size_t n) {
    simd::GradientOut out;
    out.dlogits = to;
    out.padded = std::int64_t(n);
    return out;
  }

  bool is_tempered() const { return row_.student_scale != 1; }

  void write_student_terms(const simd::RowSums& sums, double label_logit) {
    terms_[LossTerms::cross_entropy] = float(std::log(sums.plain) + sums.student_max - label_logit);
    terms_[LossTerms::student_entropy] = float(std::log(sums.student) - sums.student_dot / sums.student);
  }
  void write_teacher_terms(const simd::RowSums& sums) {
    terms_[LossTerms::teacher_entropy] = float(std::log(sums.teacher) - sums.teacher_dot / sums.teacher);
    terms_[LossTerms::top1_agreement] = sums.agreement ? 1 : 0;
  }

  // NaN or infinity among the logits: the step is not to be applied, and nobody shall overlook it.
  void not_finite() {
    constexpr float nan = std::numeric_limits<float>::quiet_NaN();
    (row_.teacher ? terms_[LossTerms::divergence] : terms_[LossTerms::cross_entropy]) = nan;
    fill(nan);
  }
  void fill(float gradient) {
    with_float_type(out_.type, [&](auto type) {
      using T = decltype(type);
      T* to = static_cast<T*>(out_.dlogits);
      std::fill(to, to + row_.columns, T(gradient));
      std::fill(to + row_.columns, to + out_.padded, T(0.0f));
    });
  }

  float* terms_;
  simd::GradientOut out_;
  simd::Row row_;
  const LossSpec& spec_;
  simd::Scratch& scratch_;
  bool wants_gradient_;
  double ce_weight_, weight_;
};

}  // namespace distill
