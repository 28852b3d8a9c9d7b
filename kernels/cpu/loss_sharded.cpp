#include "kernels/cpu/loss_sharded.h"

#include <omp.h>

#include <algorithm>
#include <functional>
#include <type_traits>

namespace distill {
namespace {

using Candidate = LossScratch::Candidate;
using simd::Boundary;
using simd::CrossSums;

// Orders by teacher logit, then by id: a smaller id is a larger key.
std::uint64_t key_of(const Candidate& x) { return std::uint64_t(ordered_bits(x.teacher)) << 32 | ~std::uint32_t(x.id); }

class ShardedLoss {
 public:
  ShardedLoss(const LossCall& call, Communicator& group, LossScratch& scratch)
      : call_(call), group_(group), scratch_(scratch), rows_(std::size_t(call.student.rows)) {}

  void run() {
    if (!call_.has_teacher()) return cross_entropy_alone();
    has_cut(call_.spec) ? top_k() : whole_vocabulary();
  }

 private:
  void cross_entropy_alone() {
    sum_rows(CrossSums::none);
    for_rows([&](std::size_t r, simd::Scratch& scratch) { loss_of(r, scratch).cross_entropy_alone(scratch_.sums[r]); });
  }

  void whole_vocabulary() {
    const CrossSums cross = RowDivergence::needs(call_.spec);
    const bool is_general = cross == CrossSums::none;
    sum_rows(cross);
    scratch_.parts.assign(rows_, {});
    if (is_general) sum_divergences();
    if (call_.spec.objective == Objective::adaptive_kl) find_gaps();
    for_rows([&](std::size_t r, simd::Scratch& scratch) {
      const PositionSums& sums = scratch_.sums[r];
      RowLoss loss = loss_of(r, scratch);
      loss.whole_vocabulary(sums, [&] {
        // A second time, for what the gradient reads: keeping it for all positions would take as much as the logits.
        if (is_general && call_.scale != 0) simd::divergence_sums(row(r), sums.columns, call_.spec, scratch);
        return scratch_.parts[r];
      });
    });
  }

  // --- sums over the vocabulary

  void sum_rows(CrossSums cross) {
    sum_rows([&](std::size_t r, simd::Scratch& scratch) { return loss_of(r, scratch).sums_of(row(r), cross); });
  }

  // scratch_.sums = what sums_here(r, scratch) gives on all ranks together, added in the order of ranks.
  template <class SumsHere>
  requires std::is_invocable_v<SumsHere, std::size_t, simd::Scratch&>
  void sum_rows(SumsHere&& sums_here) {
    std::vector<PositionSums>& all = scratch_.gathered_sums;
    all.assign(ranks() * rows_, {});
    for_rows([&](std::size_t r, simd::Scratch& scratch) { all[rank() * rows_ + r] = sums_here(r, scratch); });
    gather(all);
    scratch_.sums.resize(rows_);
    for (std::size_t r = 0; r < rows_; ++r) {
      const simd::Row scales = row(r);
      PositionSums& sums = scratch_.sums[r] = all[r];
      for (std::size_t other = r + rows_; other < all.size(); other += rows_) {
        sums.columns.merge(all[other].columns, scales.student_scale, scales.teacher_scale);
        sums.label_logit += all[other].label_logit;
      }
    }
  }

  void sum_divergences() {
    std::vector<double>& sums = scratch_.statistics;
    sums.assign(2 * rows_, 0);
    for_rows([&](std::size_t r, simd::Scratch& scratch) {
      if (!is_finite(r)) return;
      const auto [value, slope] = simd::divergence_sums(row(r), scratch_.sums[r].columns, call_.spec, scratch);
      sums[2 * r] = value;
      sums[2 * r + 1] = slope;
    });
    sum_over_ranks(sums);
    for (std::size_t r = 0; r < rows_; ++r) scratch_.parts[r].sums = {sums[2 * r], sums[2 * r + 1]};
  }

  // --- adaptive_kl: the interval where the head ends, narrowed for all positions at once

  void find_gaps() {
    start_boundaries();
    while (!std::all_of(scratch_.boundaries.begin(), scratch_.boundaries.end(), std::mem_fn(&Boundary::found)))
      narrow_boundaries();
    for (std::size_t r = 0; r < rows_; ++r) {
      const double far_gap = scratch_.boundaries[r].far_gap;
      simd::HeadTailGaps& gaps = scratch_.parts[r].gaps;
      gaps = {std::max(0.0, gaps.head - far_gap), far_gap};
    }
  }

  // Leaves Σ |q − p| of the whole vocabulary as the head's.
  void start_boundaries() {
    constexpr std::size_t width = 2 * simd::pivots + 1;
    const double alpha = call_.spec.adaptive_alpha;
    std::vector<double>& sums = scratch_.statistics;
    sums.assign(width * rows_, 0);
    for_rows([&](std::size_t r, simd::Scratch&) {
      if (!is_finite(r)) return;
      float at[simd::pivots];
      simd::first_pivots(at, scratch_.sums[r].columns, alpha);
      const simd::PivotSums here = simd::pivot_sums(row(r), scratch_.sums[r].columns, at);
      double* to = &sums[width * r];
      to = std::copy(std::begin(here.mass), std::end(here.mass), to);
      to = std::copy(std::begin(here.gap), std::end(here.gap), to);
      *to = here.total_gap;
    });
    sum_over_ranks(sums);
    scratch_.boundaries.assign(rows_, {});
    for (std::size_t r = 0; r < rows_; ++r) {
      Boundary& boundary = scratch_.boundaries[r];
      if (!is_finite(r)) {
        boundary.far = boundary.near;  // nothing to find
        continue;
      }
      float at[simd::pivots];
      simd::first_pivots(at, scratch_.sums[r].columns, alpha);
      simd::PivotSums all;
      const double* from = &sums[width * r];
      std::copy_n(from, simd::pivots, all.mass);
      std::copy_n(from + simd::pivots, simd::pivots, all.gap);
      boundary.narrow(at, all, alpha);
      scratch_.parts[r].gaps.head = from[width - 1];
    }
  }

  void narrow_boundaries() {
    constexpr std::size_t bins = Boundary::bins, width = 2 * bins;
    std::vector<double>& sums = scratch_.statistics;
    sums.assign(width * rows_, 0);
    for_rows([&](std::size_t r, simd::Scratch&) {
      const Boundary& boundary = scratch_.boundaries[r];
      double* to = &sums[width * r];
      if (!boundary.found()) simd::add_histogram(to, to + bins, row(r), scratch_.sums[r].columns, boundary);
    });
    sum_over_ranks(sums);
    for (std::size_t r = 0; r < rows_; ++r) {
      Boundary& boundary = scratch_.boundaries[r];
      const double* mass = &sums[width * r];
      if (!boundary.found()) boundary.narrow(mass, mass + bins, call_.spec.adaptive_alpha);
    }
  }

  // --- top-k: every rank sends its own k largest, all find the same k among them

  void top_k() {
    exchange_candidates();
    scratch_.least_kept.resize(rows_);
    for_rows([&](std::size_t r, simd::Scratch& scratch) { scratch_.least_kept[r] = least_kept(r, scratch); });
    sum_rows([&](std::size_t r, simd::Scratch& scratch) {
      collect_kept(r, scratch);
      simd::Row rest = row(r);
      rest.holes = scratch.ids;
      return loss_of(r, scratch).sums_of(rest, CrossSums::none);
    });
    for_rows([&](std::size_t r, simd::Scratch& scratch) {
      const std::size_t first_here = collect_kept(r, scratch);
      loss_of(r, scratch).top_k(scratch_.least_kept[r] != none_kept, scratch_.sums[r], first_here);
    });
  }

  // Of each row first how many candidates there are (−1: NaN kept them from being found), then they, ids ascending.
  void exchange_candidates() {
    std::vector<double>& widest = scratch_.statistics;
    widest.assign(1, double(call_.columns));
    group_.all_reduce(View(widest.data(), 1, 1, DType::f64), Reduce::max);
    stride_ = 1 + std::size_t(std::min<std::int64_t>(call_.spec.topk, std::int64_t(widest[0])));
    scratch_.candidates.assign(ranks() * rows_ * stride_, {});
    for_rows([&](std::size_t r, simd::Scratch& scratch) {
      const int k = int(std::min<std::int64_t>(call_.spec.topk, call_.columns));
      Candidate* to = candidates(rank(), r);
      const bool found = find_topk_here(r, k, scratch);
      to->id = found ? k : -1;
      if (found) write_candidates(to + 1, r, scratch.ids);
    });
    gather(scratch_.candidates);
  }

  bool find_topk_here(std::size_t r, int k, simd::Scratch& scratch) const {
    if (k < call_.columns) return simd::find_topk(row(r), k, scratch);
    scratch.ids.clear();
    for (std::int32_t id = 0; id < k; ++id) scratch.ids.push_back(id);
    return true;
  }

  void write_candidates(Candidate* to, std::size_t r, const std::vector<std::int32_t>& ids) const {
    const simd::Row from = row(r);
    with_float_type(from.teacher_type, [&](auto type) {
      const auto* teacher = static_cast<const decltype(type)*>(from.teacher);
      for (const std::int32_t id : ids)
        *to++ = {readable_as<float>(teacher[id]), readable(from.student[id]), std::int32_t(call_.first + id)};
    });
  }

  static constexpr std::uint64_t none_kept = UINT64_MAX;

  // The key of the k-th largest entry; none_kept when a rank could not find its candidates.
  std::uint64_t least_kept(std::size_t r, simd::Scratch& scratch) {
    scratch.order.clear();
    for (std::size_t rank = 0; rank < ranks(); ++rank) {
      const Candidate* from = candidates(rank, r);
      if (from->id < 0) return none_kept;
      std::transform(from + 1, from + 1 + from->id, std::back_inserter(scratch.order), key_of);
    }
    const auto kth = scratch.order.begin() + call_.spec.topk - 1;
    std::nth_element(scratch.order.begin(), kth, scratch.order.end(), std::greater<>());
    return *kth;
  }

  // Kept logits of all ranks and columns of those here into the scratch memory; returns how many come before these.
  std::size_t collect_kept(std::size_t r, simd::Scratch& scratch) {
    scratch.ids.clear();
    scratch.kept_student.clear();
    scratch.kept_teacher.clear();
    std::size_t first_here = 0;
    if (scratch_.least_kept[r] == none_kept) return first_here;
    for (std::size_t rank = 0; rank < ranks(); ++rank) {
      if (rank == this->rank()) first_here = scratch.kept_student.size();
      const Candidate* from = candidates(rank, r);
      for (const Candidate& x : std::span(from + 1, std::size_t(from->id))) {
        if (key_of(x) < scratch_.least_kept[r]) continue;
        scratch.kept_student.push_back(x.student);
        scratch.kept_teacher.push_back(x.teacher);
        if (rank == this->rank()) scratch.ids.push_back(std::int32_t(x.id - call_.first));
      }
    }
    return first_here;
  }

  Candidate* candidates(std::size_t rank, std::size_t r) { return &scratch_.candidates[(rank * rows_ + r) * stride_]; }

  // --- rows and ranks

  std::size_t ranks() const { return std::size_t(group_.size()); }
  std::size_t rank() const { return std::size_t(group_.rank()); }
  simd::Row row(std::size_t r) const { return call_.row(std::int64_t(r)); }
  bool is_finite(std::size_t r) const { return scratch_.sums[r].columns.finite(); }

  RowLoss loss_of(std::size_t r, simd::Scratch& scratch) const {
    const std::int64_t at = std::int64_t(r);
    return {call_.terms_of(at), call_.gradient(at), call_.row(at), call_.spec, call_.scale, scratch};
  }

  // body(row, scratch memory of the thread)
  template <class Body>
  void for_rows(Body&& body) {
#pragma omp parallel for num_threads(call_.threads) schedule(static)
    for (std::size_t r = 0; r < rows_; ++r) body(r, scratch_.threads[std::size_t(omp_get_thread_num())]);
  }

  // all: the same number of elements of every rank, this one's at its place.
  template <class T>
  void gather(std::vector<T>& all) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % sizeof(std::int32_t) == 0);
    const std::int64_t words = std::int64_t(all.size() * sizeof(T) / sizeof(std::int32_t)),
                       mine = words / group_.size();
    const View whole(all.data(), 1, words, DType::i32);
    group_.all_gather(whole, whole.col_slice(group_.rank() * mine, mine));
  }
  void sum_over_ranks(std::vector<double>& x) {
    group_.all_reduce(View(x.data(), 1, std::int64_t(x.size()), DType::f64));
  }

  const LossCall& call_;
  Communicator& group_;
  LossScratch& scratch_;
  std::size_t rows_, stride_ = 0;
};

}  // namespace

void sharded_rows(const LossCall& call, Communicator& group, LossScratch& scratch) {
  ShardedLoss(call, group, scratch).run();
}

}  // namespace distill
