// The passes over the vocabulary. A pass leaves a few statistics per position; with the vocabulary cut over ranks these
// are reduced over the ranks, and nothing else is sent; then a thread per position takes them into what is known of it.
#pragma once

#include "kernels/cuda/language.h"  // before what includes the toolkit's headers

#include <vector>

#include "kernels/cuda/loss.h"
#include "kernels/cuda/memory.cuh"
#include "kernels/cuda/team.cuh"
#include "kernels/loss_rows.h"

namespace distill::cuda {

// What is known of a position so far.
template <class S>
struct Position {
  Maxima<S> most = {};
  SoftmaxSums<S> sums = {};
  Threshold<OrderedBits<S>, S> topk = {}, head = {};
  Threshold<std::uint32_t, S> tie = {};
  Maxima<S> cut_most = {};
  LogSums<S> kept = {}, rest = {};
  double head_weight = 0, tail_weight = 0;
  DivergenceSums<S> total = {};
};

// A call as kernels see it.
template <class S, class T>
struct LossArguments {
  Rows<const S> student;
  Rows<const T> teacher;  // null: no teacher
  const std::int32_t* labels;
  Rows<S> terms;
  LossSpec spec;
  S scale;
  std::int64_t columns, padded, first;
  Position<S>* positions;
  S* statistics;  // [C, width of the pass]

  __device__ LossRow<S, T> row(std::int64_t r) const {
    LossRow<S, T> x;
    x.student = student[r];
    x.teacher = teacher.data ? teacher[r] : nullptr;
    x.columns = columns;
    x.padded = padded;
    x.first = first;
    x.label = labels[r];
    return x;
  }
  __device__ bool has_bucket() const { return is_cut(spec) && spec.topk_mode == TopkMode::tail; }
  __device__ Outcomes<S, T> outcomes(std::int64_t r) const {
    const Position<S>& p = positions[r];
    Outcomes<S, T> x{CentredRow<S, T>(row(r), p.most, spec)};
    x.whole = log_sums({S(0), S(0)}, p.sums.student, p.sums.teacher);
    if (!is_cut(spec)) return x;
    x.is_cut = true;
    x.cut = {p.topk.key, ~p.tie.key};
    x.has_bucket = has_bucket();
    if (x.has_bucket)
      x.rest = p.rest;
    else
      x.whole = p.kept;
    return x;
  }
  DISTILL_HD static bool is_cut(const LossSpec& s) { return s.topk > 0 && s.topk < s.vocabulary; }
};

// --- passes: part() leaves `width` statistics of this rank's columns, absorb() takes those of all ranks.

struct MaximaPass {
  static constexpr int width = 2;
  static constexpr Reduce reduce = Reduce::max;
  template <class S, class T>
  __device__ void part(S* to, const LossArguments<S, T>& call, std::int64_t r) const {
    const Maxima<S> most = row_maxima(Block(), call.row(r));
    to[0] = most.student, to[1] = most.teacher;
  }
  template <class S>
  __device__ void absorb(Position<S>& p, const S* from) const {
    p = {};
    p.most = {from[0], from[1]};
  }
};

struct SumsPass {
  static constexpr int width = 7;
  static constexpr Reduce reduce = Reduce::sum;
  template <class S, class T>
  __device__ void part(S* to, const LossArguments<S, T>& call, std::int64_t r) const {
    const SoftmaxSums<S> x = row_sums(Block(), CentredRow<S, T>(call.row(r), call.positions[r].most, call.spec));
    to[0] = x.plain, to[1] = x.label, to[2] = x.student, to[3] = x.student_dot;
    to[4] = x.teacher, to[5] = x.teacher_dot, to[6] = x.agreements;
  }
  template <class S>
  __device__ void absorb(Position<S>& p, const S* from) const {
    p.sums = {from[0], from[1], from[2], from[3], from[4], from[5], from[6]};
  }
};

// One digit of a threshold (loss_rows.h, find_threshold).
template <class S>
__device__ void put(S* to, const DigitSums<S>& sums) {
  for (int d = 0; d < DigitSums<S>::bins; ++d) to[d] = sums.weight[d];
}
template <class S>
__device__ DigitSums<S> digit_from(const S* from) {
  DigitSums<S> sums;
  for (int d = 0; d < DigitSums<S>::bins; ++d) sums.weight[d] = from[d];
  return sums;
}

struct TopkDigit {
  static constexpr int width = 16;
  static constexpr Reduce reduce = Reduce::sum;
  int k, shift;
  template <class S, class T>
  __device__ void part(S* to, const LossArguments<S, T>& call, std::int64_t r) const {
    const LossRow<S, T> row = call.row(r);
    put(to, digit_sums<OrderedBits<S>, S>(Block(), TeacherCounts<S, T>{row}, call.positions[r].topk.key, shift));
  }
  template <class S>
  __device__ void absorb(Position<S>& p, const S* from) const {
    take_digit(p.topk, digit_from(from), shift, S(k) - S(0.5));
  }
};

struct TieDigit {
  static constexpr int width = 16;
  static constexpr Reduce reduce = Reduce::sum;
  int k, shift;
  template <class S, class T>
  __device__ void part(S* to, const LossArguments<S, T>& call, std::int64_t r) const {
    const Position<S>& p = call.positions[r];
    const LossRow<S, T> row = call.row(r);
    put(to, digit_sums<std::uint32_t, S>(Block(), TieCounts<S, T>{row, p.topk.key}, p.tie.key, shift));
  }
  template <class S>
  __device__ void absorb(Position<S>& p, const S* from) const {
    take_digit(p.tie, digit_from(from), shift, S(k) - p.topk.above - S(0.5));
  }
};

struct CutMaximaPass {
  static constexpr int width = 2;
  static constexpr Reduce reduce = Reduce::max;
  bool kept;
  template <class S, class T>
  __device__ void part(S* to, const LossArguments<S, T>& call, std::int64_t r) const {
    const Outcomes<S, T> all = call.outcomes(r);
    const Maxima<S> most = cut_maxima(Block(), all.x, all.cut, kept);
    to[0] = most.student, to[1] = most.teacher;
  }
  template <class S>
  __device__ void absorb(Position<S>& p, const S* from) const {
    p.cut_most = {from[0], from[1]};
  }
};

struct CutSumsPass {
  static constexpr int width = 2;
  static constexpr Reduce reduce = Reduce::sum;
  bool kept;
  template <class S, class T>
  __device__ void part(S* to, const LossArguments<S, T>& call, std::int64_t r) const {
    const Outcomes<S, T> all = call.outcomes(r);
    const CutSums<S> sums = cut_sums(Block(), all.x, all.cut, kept, call.positions[r].cut_most);
    to[0] = sums.student, to[1] = sums.teacher;
  }
  template <class S>
  __device__ void absorb(Position<S>& p, const S* from) const {
    (kept ? p.kept : p.rest) = log_sums(p.cut_most, from[0], from[1]);
  }
};

struct HeadDigit {
  static constexpr int width = 16;
  static constexpr Reduce reduce = Reduce::sum;
  float alpha;
  int shift;
  template <class S, class T>
  __device__ void part(S* to, const LossArguments<S, T>& call, std::int64_t r) const {
    const Outcomes<S, T> all = call.outcomes(r);
    put(to, digit_sums<OrderedBits<S>, S>(Block(), TeacherMass<S, T>{all}, call.positions[r].head.key, shift));
  }
  template <class S>
  __device__ void absorb(Position<S>& p, const S* from) const {
    take_digit(p.head, digit_from(from), shift, S(alpha));
  }
};

struct HeadTailPass {
  static constexpr int width = 2;
  static constexpr Reduce reduce = Reduce::sum;
  template <class S, class T>
  __device__ void part(S* to, const LossArguments<S, T>& call, std::int64_t r) const {
    const HeadTailSums<S> sums = head_tail_sums(Block(), call.outcomes(r), call.positions[r].head.key);
    to[0] = sums.head, to[1] = sums.tail;
  }
  template <class S>
  __device__ void absorb(Position<S>& p, const S* from) const {
    const AdaptiveKl x = weighted(AdaptiveKl{}, HeadTailSums<S>{from[0], from[1]});
    p.head_weight = x.head_weight, p.tail_weight = x.tail_weight;
  }
};

// With what the position knows: only adaptive_kl has weights of its own.
template <class Divergence, class S>
__device__ Divergence of_position(Divergence divergence, const Position<S>& p) {
  if constexpr (std::is_same_v<Divergence, AdaptiveKl>)
    divergence.head_weight = p.head_weight, divergence.tail_weight = p.tail_weight;
  return divergence;
}

template <class Divergence>
struct DivergencePass {
  static constexpr int width = 2;
  static constexpr Reduce reduce = Reduce::sum;
  Divergence divergence;
  template <class S, class T>
  __device__ void part(S* to, const LossArguments<S, T>& call, std::int64_t r) const {
    const DivergenceSums<S> sums =
        divergence_sums(Block(), call.outcomes(r), of_position(divergence, call.positions[r]));
    to[0] = sums.value, to[1] = sums.slope;
  }
  template <class S>
  __device__ void absorb(Position<S>& p, const S* from) const {
    p.total = {from[0], from[1]};
  }
};

// --- kernels

template <class Pass, class S, class T>
__global__ void __launch_bounds__(512) pass_kernel(LossArguments<S, T> call, Pass pass) {
  S part[Pass::width];
  pass.part(part, call, blockIdx.x);
  if (threadIdx.x > 0) return;
  for (int i = 0; i < Pass::width; ++i) call.statistics[std::int64_t(blockIdx.x) * Pass::width + i] = part[i];
}

template <class Pass, class S>
__global__ void absorb_kernel(Position<S>* positions, const S* statistics, std::int64_t rows, Pass pass) {
  const std::int64_t r = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (r < rows) pass.absorb(positions[r], statistics + r * Pass::width);
}

// A row of gradients of any type that takes numbers of S. f64 gradients go with f64 students.
template <class S>
struct GradientRow {
  void* data;
  std::int64_t stride;
  DType type;
};

template <class S, class Body>
__device__ void with_gradient(const GradientRow<S>& to, std::int64_t r, Body&& body) {
  if constexpr (std::is_same_v<S, double>) {
    body(static_cast<double*>(to.data) + r * to.stride);
  } else {
    if (to.type == DType::f32) body(static_cast<float*>(to.data) + r * to.stride);
    if (to.type == DType::bf16) body(static_cast<bf16*>(to.data) + r * to.stride);
    if (to.type == DType::f16) body(static_cast<f16*>(to.data) + r * to.stride);
  }
}

template <class Divergence, class S, class T>
__global__ void __launch_bounds__(512)
    gradient_kernel(GradientRow<S> to, LossArguments<S, T> call, Divergence divergence) {
  using std::log;
  const std::int64_t r = blockIdx.x;
  const Position<S>& p = call.positions[r];
  const Outcomes<S, T> all = call.outcomes(r);
  const S log_plain = log(p.sums.plain);
  with_gradient(to, r, [&](auto* row) {
    row_gradient(Block(), row, all, of_position(divergence, p), p.total.slope, log_plain, call.spec, call.scale);
  });
}

// Without a teacher.
template <class S, class T>
__global__ void __launch_bounds__(512) cross_entropy_gradient_kernel(GradientRow<S> to, LossArguments<S, T> call) {
  using std::log;
  const std::int64_t r = blockIdx.x;
  const Position<S>& p = call.positions[r];
  const CentredRow<S, T> x(call.row(r), p.most, call.spec);
  with_gradient(
      to, r, [&](auto* row) { cross_entropy_row_gradient(Block(), row, x, log(p.sums.plain), call.spec, call.scale); });
}

// A label outside the vocabulary, which the host cannot see, gives NaN.
template <class S, class T>
__global__ void terms_kernel(LossArguments<S, T> call, std::int64_t rows) {
  using std::log;
  const std::int64_t r = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (r >= rows) return;
  const Position<S>& p = call.positions[r];
  const bool has_teacher = call.teacher.data != nullptr,
             is_known = call.labels[r] >= 0 && call.labels[r] < call.spec.vocabulary;
  const S log_zs = log(p.sums.student);
  const S teacher_entropy = has_teacher ? log(p.sums.teacher) - p.sums.teacher_dot / p.sums.teacher : S(0);
  S* const terms = call.terms[r];
  terms[LossTerms::cross_entropy] = is_known ? log(p.sums.plain) - p.sums.label : std::numeric_limits<S>::quiet_NaN();
  // A NaN that the cut left out must still be seen.
  terms[LossTerms::divergence] = has_teacher ? p.total.value + S(0) * (teacher_entropy + log_zs) : S(0);
  terms[LossTerms::student_entropy] = log_zs - p.sums.student_dot / p.sums.student;
  terms[LossTerms::teacher_entropy] = teacher_entropy;
  terms[LossTerms::top1_agreement] = p.sums.agreements > S(0) ? S(1) : S(0);
  terms[LossTerms::topk_mass] = has_teacher && call.is_cut(call.spec) ? mass(p.kept, p.sums) : S(1);
}

// --- the sequence

template <class S, class T>
class Loss {
 public:
  explicit Loss(const LossCall& call)
      : call_(call),
        rows_(call.student.rows),
        threads_(call.columns >= 16384 ? 512 : 128),
        gradient_{call.dlogits.mutable_data(), call.dlogits.stride, call.dlogits.dtype} {
    constexpr int widest = 16;
    const std::size_t known = std::size_t(rows_) * sizeof(Position<S>);
    char* const memory = static_cast<char*>(call.scratch.bytes(known + std::size_t(rows_) * widest * sizeof(S)));
    arguments_.student = rows_of<S>(call.student);
    // A teacher without a column here is still one; nothing of it is read.
    if (has_teacher())
      arguments_.teacher =
          call.teacher.data ? rows_of<T>(call.teacher) : Rows<const T>{reinterpret_cast<const T*>(memory)};
    arguments_.labels = call.labels.as<std::int32_t>();
    arguments_.terms = rows_of<S>(call.terms);
    arguments_.spec = call.spec;
    arguments_.scale = S(call.scale);
    arguments_.columns = call.columns;
    arguments_.padded = call.student.cols;
    arguments_.first = call.first;
    arguments_.positions = reinterpret_cast<Position<S>*>(memory);
    arguments_.statistics = reinterpret_cast<S*>(memory + known);
  }

  void run() {
    pass(MaximaPass());
    pass(SumsPass());
    if (has_teacher()) {
      if (arguments_.is_cut(call_.spec)) find_topk();
      with_divergence(call_.spec, [this](const auto& divergence) { diverge(divergence); });
    } else if (call_.scale != 0) {
      launch(cross_entropy_gradient_kernel<S, T>, per_row(), call_.stream, gradient_, arguments_);
    }
    launch(terms_kernel<S, T>, per_thread(), call_.stream, arguments_, rows_);
  }

 private:
  bool has_teacher() const { return call_.teacher.rows > 0; }

  template <class Key, class MakePass>
  void digits(MakePass&& make) {
    for (int shift = first_digit<Key>; shift >= 0; shift -= DigitSums<S>::bits) pass(make(shift));
  }

  void find_topk() {
    const int k = call_.spec.topk;
    digits<OrderedBits<S>>([=](int shift) { return TopkDigit{k, shift}; });
    digits<std::uint32_t>([=](int shift) { return TieDigit{k, shift}; });
    pass(CutMaximaPass{true});
    pass(CutSumsPass{true});
    if (call_.spec.topk_mode == TopkMode::renormalize) return;
    pass(CutMaximaPass{false});
    pass(CutSumsPass{false});
  }

  template <class Divergence>
  void diverge(const Divergence& divergence) {
    if constexpr (std::is_same_v<Divergence, AdaptiveKl>) {
      digits<OrderedBits<S>>([&](int shift) { return HeadDigit{divergence.alpha, shift}; });
      pass(HeadTailPass());
    }
    pass(DivergencePass<Divergence>{divergence});
    if (call_.scale != 0)
      launch(gradient_kernel<Divergence, S, T>, per_row(), call_.stream, gradient_, arguments_, divergence);
  }

  template <class Pass>
  void pass(const Pass& p) {
    launch(pass_kernel<Pass, S, T>, per_row(), call_.stream, arguments_, p);
    if (call_.group) reduce_over_ranks(Pass::width, Pass::reduce);
    launch(absorb_kernel<Pass, S>, per_thread(), call_.stream, arguments_.positions, arguments_.statistics, rows_, p);
  }

  // A few numbers a position.
  void reduce_over_ranks(int width, Reduce reduce) {
    call_.group->all_reduce(View(arguments_.statistics, 1, rows_ * width, dtype_of<S>), reduce);
  }

  Grid per_row() const { return Grid(as_blocks(rows_), threads_); }
  Grid per_thread() const { return Grid(as_blocks(blocks_for(rows_, 128)), 128); }

  const LossCall& call_;
  std::int64_t rows_;
  unsigned threads_;
  GradientRow<S> gradient_;
  LossArguments<S, T> arguments_{};
};

template <class S, class T>
void run_loss(const LossCall& call) {
  Loss<S, T>(call).run();
}

}  // namespace distill::cuda
