#include "kernels/cpu/loss.h"

#include <omp.h>

#include <algorithm>

#include "core/communicator.h"
#include "core/distill/divergence.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/cpu/loss_row.h"
#include "kernels/cpu/loss_sharded.h"
#include "kernels/loss_rows.h"

namespace distill {
namespace {

// --- f64: the plain passes

template <class T, class Team, class Divergence>
void plain_row(const LossCall& call, std::int64_t r, const Divergence& divergence, Team team) {
  LossRow<double, T> row;
  row.student = call.student.as<double>() + r * call.student.stride;
  row.teacher = call.has_teacher() ? call.teacher.as<T>() + r * call.teacher.stride : nullptr;
  row.columns = call.columns;
  row.padded = call.student.cols;
  row.first = call.first;
  row.label = call.label(r);
  distill_row(team, call.dlogits.as<double>() + r * call.dlogits.stride,
              call.terms.as<double>() + r * call.terms.stride, row, divergence, call.spec, double(call.scale));
}

// One lane a rank. Every reduction of a row is a message of its own: for gradient checks.
class RankTeam {
 public:
  explicit RankTeam(Communicator& group) : group_(&group) {}
  int lane() const { return 0; }
  int lanes() const { return 1; }
  double sum(double x) const { return reduce(x, Reduce::sum); }
  double max(double x) const { return reduce(x, Reduce::max); }
  void sum_each(double* x, int n) const { group_->all_reduce(View(x, 1, n, DType::f64)); }

 private:
  double reduce(double x, Reduce op) const {
    group_->all_reduce(View(&x, 1, 1, DType::f64), op);
    return x;
  }
  Communicator* group_;
};

template <class T>
void plain_rows(const LossCall& call, Communicator* group) {
  with_divergence(call.spec, [&](const auto& divergence) {
    if (group) {
      for (std::int64_t r = 0; r < call.student.rows; ++r) plain_row<T>(call, r, divergence, RankTeam(*group));
      return;
    }
#pragma omp parallel for num_threads(call.threads) schedule(static)
    for (std::int64_t r = 0; r < call.student.rows; ++r) plain_row<T>(call, r, divergence, Lone{});
  });
}

// --- f32: vector passes

void vector_rows(const LossCall& call, LossScratch& scratch) {
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (std::int64_t r = 0; r < call.student.rows; ++r) {
    const simd::Row row = call.row(r);
    RowLoss(call.terms_of(r), call.gradient(r), row, call.spec, call.scale,
            scratch.threads[std::size_t(omp_get_thread_num())])
        .run();
  }
}

}  // namespace

void distill_loss_cpu(View dlogits, View terms, const ConstView& student, const ConstView& teacher,
                      const ConstView& labels, const LossSpec& spec, float scale, int threads, LossScratch& scratch,
                      const VocabularyShard& shard) {
  const bool is_f64 = student.dtype == DType::f64;
  check(is_f64 == (dlogits.dtype == DType::f64), "distill_loss: dlogits ", dlogits, " for student ", student);
  for (std::int64_t r = 0; r < labels.cols; ++r) {
    const std::int32_t label = labels.as<std::int32_t>()[r];
    check(label >= 0 && label < spec.vocabulary, "distill_loss: label ", label, " of position ", r,
          " is not in the vocabulary of ", spec.vocabulary);
  }
  Communicator* const group = shard.group && shard.group->size() > 1 ? shard.group : nullptr;
  const std::int64_t columns =
      group ? std::clamp<std::int64_t>(spec.vocabulary - shard.first, 0, student.cols) : spec.vocabulary;
  LossCall call{dlogits, terms, student, teacher, labels, spec, scale, threads, shard.first, columns};
  // A teacher without a column here is still one.
  static constexpr double no_column = 0;
  if (call.has_teacher() && !teacher.data) call.teacher.data = &no_column;

  if (is_f64) {
    with_float_type(teacher.dtype, [&](auto type) { plain_rows<decltype(type)>(call, group); });
    return;
  }
  if (scratch.threads.size() < std::size_t(threads)) scratch.threads.resize(std::size_t(threads));
  group ? sharded_rows(call, *group, scratch) : vector_rows(call, scratch);
}

void CpuDevice::do_distill_loss(View dlogits, View terms, const ConstView& student, const ConstView& teacher,
                                const ConstView& labels, const LossSpec& spec, float scale,
                                const VocabularyShard& shard) {
  distill_loss_cpu(dlogits, terms, student, teacher, labels, spec, scale, threads_, loss_scratch_, shard);
}

}  // namespace distill
