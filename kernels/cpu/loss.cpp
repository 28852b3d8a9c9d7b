#include "kernels/cpu/loss.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/distill/divergence.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/loss_rows.h"

namespace distill {
namespace {

template <class T>
T* row_of(const View& v, std::int64_t r) {
  return v.as<T>() + r * v.stride;
}
template <class T>
const T* row_of(const ConstView& v, std::int64_t r) {
  return v.as<T>() + r * v.stride;
}
const void* bytes_of(const ConstView& v, std::int64_t r) {
  return static_cast<const char*>(v.data) + r * v.stride * std::int64_t(size_of(v.dtype));
}

// --- f64: the plain passes

template <class T>
void plain_rows(const View& dlogits, const View& terms, const ConstView& student, const ConstView& teacher,
                const ConstView& labels, const LossSpec& spec, float scale, int threads) {
  with_divergence(spec, [&](const auto& divergence) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t r = 0; r < student.rows; ++r) {
      LossRow<double, T> row;
      row.student = row_of<double>(student, r);
      row.teacher = teacher.rows > 0 ? row_of<T>(teacher, r) : nullptr;
      row.columns = spec.vocabulary;
      row.padded = student.cols;
      row.label = labels.as<std::int32_t>()[r];
      distill_row(Lone{}, row_of<double>(dlogits, r), row_of<double>(terms, r), row, divergence, spec, double(scale));
    }
  });
}

// --- f32: vector passes

// D over the columns of one row, whole or the k that top-k kept: its value, then its gradient.
class RowDivergence {
 public:
  RowDivergence(const simd::Row& row, const simd::RowSums& sums, const LossSpec& spec, simd::Scratch& scratch)
      : row_(row), sums_(sums), scratch_(scratch), log_ratio_(std::log(sums.teacher) - std::log(sums.student)) {
    switch (spec.objective) {
      case Objective::forward_kl:
        forward_weight_ = 1;
        break;
      case Objective::reverse_kl:
        reverse_weight_ = 1;
        break;
      case Objective::adaptive_kl: {
        const auto [head, tail] = simd::head_tail_gaps(row, sums, spec.adaptive_alpha, scratch);
        forward_weight_ = head + tail < 1e-12 ? 0.5 : head / (head + tail);
        reverse_weight_ = 1 - forward_weight_;
        break;
      }
      default: {
        const auto [value, slope] = simd::divergence_sums(row, sums, spec, scratch);
        value_ = value;
        slope_ = slope;
        return;
      }
    }
    // Both KL divergences follow from the sums alone: log p − log q = (a − b) + log_ratio.
    is_linear_ = true;
    reverse_ = sums.reverse / sums.student + log_ratio_;
    if (forward_weight_ != 0) value_ += forward_weight_ * (sums.forward / sums.teacher - log_ratio_);
    if (reverse_weight_ != 0) value_ += reverse_weight_ * reverse_;
  }

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
      simd::general_gradient(
          out, row_, sums_, {.weight = float(weight), .p0 = float(same - weight * slope_), .plain = float(plain)},
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

// One position of the chunk. A scale of 0 asks for the terms only.
class RowLoss {
 public:
  RowLoss(float* terms, simd::GradientOut out, const simd::Row& row, const LossSpec& spec, double scale,
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
  }

  void run() {
    terms_[LossTerms::divergence] = terms_[LossTerms::teacher_entropy] = terms_[LossTerms::top1_agreement] = 0;
    terms_[LossTerms::topk_mass] = 1;
    if (!row_.teacher)
      cross_entropy_alone();
    else if (spec_.topk > 0 && spec_.topk < row_.columns)
      top_k();
    else
      whole_vocabulary();
  }

 private:
  void cross_entropy_alone() {
    const simd::RowSums sums = simd::row_sums(row_, simd::CrossSums::none);
    write_student_terms(sums);
    const double p = ce_weight_ / sums.plain;
    simd::LinearGradient c;
    (is_tempered() ? c.plain : c.p0) = float(p);
    if (!sums.finite()) return not_finite();
    wants_gradient_ ? simd::linear_gradient(out_, row_, sums, c) : fill(0);
  }

  void whole_vocabulary() {
    const simd::RowSums sums = simd::row_sums(row_, RowDivergence::needs(spec_));
    write_student_terms(sums);
    write_teacher_terms(sums);
    if (!sums.finite()) return not_finite();
    const RowDivergence divergence(row_, sums, spec_, scratch_);
    terms_[LossTerms::divergence] = float(divergence.value());
    wants_gradient_ ? divergence.gradient(out_, weight_, ce_weight_) : fill(0);
  }

  // The kept entries, and the bucket as one more, are a small row of their own; the others have a gradient in
  // proportion to their probability, from cross-entropy and from the bucket.
  void top_k() {
    const bool found = simd::find_topk(row_, spec_.topk, scratch_);
    simd::Row rest = row_;
    rest.holes = scratch_.ids;
    if (!found) rest.holes = {};
    const simd::RowSums rest_sums = simd::row_sums(rest, simd::CrossSums::none);
    simd::Row kept = gather_kept(rest.holes);
    simd::RowSums kept_sums = simd::row_sums(kept, simd::CrossSums::none);
    simd::RowSums all = rest_sums;
    all.merge(kept_sums, row_.student_scale, row_.teacher_scale);
    write_student_terms(all);
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
    out_.values = std::span<const float>(scratch_.kept_gradient.data(), scratch_.ids.size());
    simd::linear_gradient(out_, row_, rest_sums, c);
  }

  // Fills scratch_.kept_gradient and the divergence; returns the gradient of the bucket, if there is one.
  double kept_gradient(simd::Row kept, const simd::RowSums& rest, const simd::RowSums& all) {
    const std::size_t k = scratch_.ids.size();
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

  simd::Row gather_kept(std::span<const std::int32_t> ids) {
    scratch_.kept_student.clear();
    scratch_.kept_teacher.clear();
    with_float_type(row_.teacher_type, [&](auto type) {
      const auto* teacher = static_cast<const decltype(type)*>(row_.teacher);
      for (const std::int32_t id : ids) {
        scratch_.kept_student.push_back(row_.student[id]);
        scratch_.kept_teacher.push_back(float(teacher[id]));
      }
    });
    simd::Row kept = row_;
    kept.student = scratch_.kept_student.data();
    kept.teacher = scratch_.kept_teacher.data();
    kept.teacher_type = DType::f32;
    kept.columns = std::int64_t(ids.size());
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

  void write_student_terms(const simd::RowSums& sums) {
    terms_[LossTerms::cross_entropy] =
        float(std::log(sums.plain) + sums.student_max - double(readable(row_.student[out_.label])));
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

 private:
  float* terms_;
  simd::GradientOut out_;
  const simd::Row& row_;
  const LossSpec& spec_;
  simd::Scratch& scratch_;
  bool wants_gradient_;
  double ce_weight_, weight_;
};

void vector_rows(const View& dlogits, const View& terms, const ConstView& student, const ConstView& teacher,
                 const ConstView& labels, const LossSpec& spec, float scale, int threads, LossScratch& scratch) {
  if (scratch.threads.size() < std::size_t(threads)) scratch.threads.resize(std::size_t(threads));
  // A gradient that no cache can hold until the head's products read it goes past them.
  constexpr std::size_t cache_bytes = std::size_t{16} << 20;
  const bool stream = std::size_t(dlogits.size()) * size_of(dlogits.dtype) > cache_bytes;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t r = 0; r < student.rows; ++r) {
    simd::Row row;
    row.student = row_of<float>(student, r);
    row.columns = spec.vocabulary;
    row.student_scale = float(1 / double(spec.temperature));
    row.teacher_scale = float(1 / (double(spec.temperature) * double(spec.teacher_temperature)));
    if (teacher.rows > 0) {
      row.teacher = bytes_of(teacher, r);
      row.teacher_type = teacher.dtype;
    }
    simd::GradientOut out;
    out.dlogits = const_cast<void*>(bytes_of(dlogits, r));
    out.type = dlogits.dtype;
    out.padded = dlogits.cols;
    out.stream = stream;
    out.label = labels.as<std::int32_t>()[r];
    RowLoss(row_of<float>(terms, r), out, row, spec, scale, scratch.threads[std::size_t(omp_get_thread_num())]).run();
  }
}

}  // namespace

void distill_loss_cpu(View dlogits, View terms, const ConstView& student, const ConstView& teacher,
                      const ConstView& labels, const LossSpec& spec, float scale, int threads, LossScratch& scratch) {
  const bool is_f64 = student.dtype == DType::f64;
  check(is_f64 == (dlogits.dtype == DType::f64), "distill_loss: dlogits ", dlogits, " for student ", student);
  for (std::int64_t r = 0; r < labels.cols; ++r) {
    const std::int32_t label = labels.as<std::int32_t>()[r];
    check(label >= 0 && label < spec.vocabulary, "distill_loss: label ", label, " of position ", r,
          " is not in the vocabulary of ", spec.vocabulary);
  }
  if (!is_f64) return vector_rows(dlogits, terms, student, teacher, labels, spec, scale, threads, scratch);
  with_float_type(teacher.dtype, [&](auto type) {
    plain_rows<decltype(type)>(dlogits, terms, student, teacher, labels, spec, scale, threads);
  });
}

void CpuDevice::do_distill_loss(View dlogits, View terms, const ConstView& student, const ConstView& teacher,
                                const ConstView& labels, const LossSpec& spec, float scale) {
  distill_loss_cpu(dlogits, terms, student, teacher, labels, spec, scale, threads_, loss_scratch_);
}

}  // namespace distill
