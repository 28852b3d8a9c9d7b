// Logits of a few positions, what the loss of the backend under test makes of them, and the comparison with the
// textbook.
#pragma once

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "kernels/cpu/loss.h"
#include "test/support/loss_reference.h"

namespace distill::test {

using reference::Numbers;

// A matrix of any type that is set and read as doubles, with unused columns at the end of each row.
class Matrix {
 public:
  Matrix(std::int64_t rows, std::int64_t cols, DType type, std::int64_t gap = 0)
      : bytes_(std::size_t(rows * (cols + gap)) * size_of(type), std::byte{0x7f}),
        view_(bytes_.data(), rows, cols, cols + gap, type) {}
  Matrix(const Matrix& other)
      : bytes_(other.bytes_),
        view_(bytes_.data(), other.view_.rows, other.view_.cols, other.view_.stride, other.view_.dtype) {}
  Matrix& operator=(const Matrix&) = delete;
  void set(std::int64_t r, std::int64_t c, double x) {
    with_float_type(view_.dtype, [&](auto type) {
      using T = decltype(type);
      view_.as<T>()[r * view_.stride + c] = T(Compute<T>(x));
    });
  }
  double get(std::int64_t r, std::int64_t c) const {
    double x = 0;
    with_float_type(view_.dtype, [&](auto type) {
      using T = decltype(type);
      x = Compute<T>(view_.as<T>()[r * view_.stride + c]);
    });
    return x;
  }
  Numbers row(std::int64_t r, std::int64_t columns) const {
    Numbers x;
    for (std::int64_t c = 0; c < columns; ++c) x.push_back(get(r, c));
    return x;
  }
  bool gap_untouched() const {
    const std::size_t size = size_of(view_.dtype), stride = std::size_t(view_.stride) * size;
    for (std::size_t i = 0; i < bytes_.size(); ++i)
      if (i % stride >= std::size_t(view_.cols) * size && bytes_[i] != std::byte{0x7f}) return false;
    return true;
  }
  View view() { return view_; }
  ConstView view() const { return view_; }
  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
  View view_;
};

// Device::distill_loss of the backend that this program is linked with, on operands in host memory.
void loss_under_test(View dlogits, View terms, const ConstView& student, const ConstView& teacher,
                     const ConstView& labels, const LossSpec& spec, float scale, int threads, LossScratch& scratch,
                     const VocabularyShard& shard = {});

struct Types {
  DType student = DType::f32, teacher = DType::f32, gradient = DType::f32;
};

// Logits of a few positions and what the product makes of them.
struct Chunk {
  Chunk(std::int64_t rows, std::int64_t vocabulary, Types types = {}, std::int64_t padding = 0, std::int64_t gap = 0)
      : student(rows, vocabulary + padding, types.student, gap),
        teacher(rows, vocabulary + padding / 2, types.teacher, 2 * gap),
        dlogits(rows, vocabulary + padding, types.gradient, gap),
        terms(rows, LossTerms::count, types.student, gap),
        labels(std::size_t(rows)) {
    spec.vocabulary = vocabulary;
  }

  void randomise(unsigned seed, double deviation = 3, double similarity = 0.5) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal(0, deviation);
    for (std::int64_t r = 0; r < student.view().rows; ++r) {
      for (std::int64_t c = 0; c < student.view().cols; ++c) {
        const double common = normal(random), s = normal(random), t = normal(random);
        const bool is_padding = c >= spec.vocabulary;  // larger than all others, were it read
        student.set(r, c, is_padding ? 100 : similarity * common + (1 - similarity) * s);
        if (c < teacher.view().cols) teacher.set(r, c, is_padding ? 100 : similarity * common + (1 - similarity) * t);
      }
      labels[std::size_t(r)] = std::int32_t(random() % std::uint64_t(spec.vocabulary));
    }
  }
  // To multiples of step, so that there are ties.
  void round_teacher(double step) {
    for (std::int64_t r = 0; r < teacher.view().rows; ++r)
      for (std::int64_t c = 0; c < teacher.view().cols; ++c)
        teacher.set(r, c, std::round(teacher.get(r, c) / step) * step);
  }
  void set(std::int64_t r, const Numbers& s, const Numbers& t) {
    for (std::size_t c = 0; c < s.size(); ++c) {
      student.set(r, std::int64_t(c), s[c]);
      teacher.set(r, std::int64_t(c), t[c]);
    }
  }

  void run(float scale = 1, int threads = 1) {
    const ConstView label_view(labels.data(), 1, std::int64_t(labels.size()), std::int64_t(labels.size()), DType::i32);
    loss_under_test(dlogits.view(), terms.view(), student.view(), has_teacher ? teacher.view() : ConstView(),
                    label_view, spec, scale, threads, scratch);
  }

  // Compares every term and every gradient; the tolerances are relative for f32 and come from the type below it.
  void check_against_reference(double scale = 1, double tolerance = 1e-5) const {
    const DType type = dlogits.view().dtype;
    const double storage = type == DType::bf16 ? 0x1p-8 : type == DType::f16 ? 0x1p-11 : 0;
    for (std::int64_t r = 0; r < student.view().rows; ++r) {
      const reference::Loss expected =
          reference::loss(student.row(r, spec.vocabulary), has_teacher ? teacher.row(r, spec.vocabulary) : Numbers{},
                          std::size_t(labels[std::size_t(r)]), spec);
      for (int column = 0; column < LossTerms::count; ++column) {
        INFO("row " << r << " term " << column);
        CHECK(terms.get(r, column) == Approx(expected.term(column)).epsilon(tolerance).margin(tolerance / 20));
      }
      double error2 = 0, norm2 = 0;
      std::int64_t worst = 0;
      double worst_excess = -1;
      for (std::int64_t c = 0; c < spec.vocabulary; ++c) {
        const double g = scale * expected.gradient[std::size_t(c)], error = std::abs(dlogits.get(r, c) - g);
        error2 += error * error;
        norm2 += g * g;
        // f16 has no numbers between 0 and 2⁻²⁴.
        const double allowed = (tolerance + storage) * std::abs(g) + tolerance / 20 * scale * expected.magnitude +
                               (type == DType::f16 ? 0x1p-25 : 0);
        if (error - allowed > worst_excess) worst_excess = error - allowed, worst = c;
      }
      INFO("row " << r << " column " << worst << ": " << dlogits.get(r, worst) << " expected "
                  << scale * expected.gradient[std::size_t(worst)]);
      CHECK(worst_excess <= 0);
      CHECK(std::sqrt(error2) <=
            (tolerance + storage) * std::sqrt(norm2) + tolerance / 20 * scale * expected.magnitude);
      for (std::int64_t c = spec.vocabulary; c < dlogits.view().cols; ++c)
        if (dlogits.get(r, c) != 0) FAIL_CHECK("padding column " << c << " of row " << r);
    }
  }

  Matrix student, teacher, dlogits, terms;
  std::vector<std::int32_t> labels;
  LossSpec spec;
  bool has_teacher = true;
  LossScratch scratch;
};

inline Objective any_objective() { return Objective(GENERATE(range(0, int(objective_names.size())))); }

struct Cut {
  int topk;
  TopkMode mode;
};
inline void set(LossSpec& spec, Objective objective, Cut cut) {
  spec.objective = objective;
  spec.topk = cut.topk;
  spec.topk_mode = cut.mode;
}

}  // namespace distill::test
