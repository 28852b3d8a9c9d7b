#include "core/distill/head_loss.h"

#include <algorithm>

#include "core/model/vocabulary.h"

namespace distill {

std::int64_t head_columns(std::int64_t real_vocabulary, std::int64_t rows) {
  return vocabulary_part(real_vocabulary, rows, 1, 0).columns;
}

std::int64_t default_logits_chunk(std::int64_t columns, DType dtype) {
  // Each chunk reads and writes the whole head's gradient once, so few large chunks; the upper bound keeps a small
  // vocabulary's chunk in the cache.
  constexpr std::int64_t budget = 384ll << 20;
  const std::int64_t bytes = columns * std::int64_t(size_of(wide_type(dtype)) + size_of(dtype));
  return std::clamp<std::int64_t>(budget / bytes / 64 * 64, 64, 512);
}

HeadLoss::HeadLoss(Device& device, Transformer& student, const LossSpec& spec, std::int64_t chunk,
                   std::int64_t most_supervised, Communicator* group)
    : device_(device),
      student_(student),
      spec_(spec),
      chunk_(std::min(chunk, std::max<std::int64_t>(most_supervised, 1))) {
  const VocabularyPart part =
      vocabulary_part(spec.vocabulary, student.spec().vocabulary, group ? group->size() : 1, group ? group->rank() : 0);
  check(spec.vocabulary <= student.spec().vocabulary, "a real vocabulary of ", spec.vocabulary, " and a head of ",
        student.spec().vocabulary, " rows");
  shard_ = {part.first, group};
  columns_ = part.columns;
  const DType type = student.dtype(), wide = wide_type(type);
  logits_ = device.tensor(chunk_, columns_, wide);
  dlogits_ = device.tensor(chunk_, columns_, type);
  terms_ = device.tensor(chunk_, LossTerms::count, wide);
  dhidden_ = device.tensor(most_supervised, student.spec().hidden, type);
  sums_ = device.tensor(1, LossTerms::count, DType::f64);
  device.zero(sums_.view());
}

// after_loss(first position, hidden [n, H], dlogits [n, columns]) per chunk of n positions.
template <class AfterLoss>
void HeadLoss::for_each_chunk(const ConstView& hidden, const ConstView& labels, TeacherSource* teacher, double scale,
                              AfterLoss&& after_loss) {
  check((teacher != nullptr) == (spec_.distill_weight != 0),
        "a teacher is needed exactly when the distillation weight is not 0");
  for (std::int64_t first = 0; first < hidden.rows; first += chunk_) {
    const std::int64_t n = std::min(chunk_, hidden.rows - first);
    const ConstView h = hidden.row_slice(first, n);
    const View logits = logits_.view().row_slice(0, n), dlogits = dlogits_.view().row_slice(0, n),
               terms = terms_.view().row_slice(0, n);
    device_.gemm(logits, h, transposed(student_.head(columns_)));
    const ConstView teacher_logits = teacher ? teacher->acquire(n) : ConstView();
    device_.distill_loss(dlogits, terms, logits, teacher_logits, labels.col_slice(first, n), spec_, float(scale),
                         shard_);
    if (teacher) teacher->release();
    device_.column_sums(sums_.view(), terms);
    after_loss(first, h, dlogits);
  }
}

ConstView HeadLoss::forward_backward(const ConstView& hidden, const ConstView& labels, TeacherSource* teacher,
                                     double scale) {
  const View dhidden = dhidden_.view().row_slice(0, hidden.rows);
  for_each_chunk(hidden, labels, teacher, scale, [&](std::int64_t first, const ConstView& h, const ConstView& dlogits) {
    device_.gemm(student_.head_gradient(columns_), transposed(dlogits), h, Write::accumulate);
    device_.gemm(dhidden.row_slice(first, h.rows), dlogits, student_.head(columns_));
  });
  if (shard_.group) shard_.group->all_reduce(dhidden);
  return dhidden;
}

void HeadLoss::forward(const ConstView& hidden, const ConstView& labels, TeacherSource* teacher) {
  for_each_chunk(hidden, labels, teacher, 0, [](std::int64_t, const ConstView&, const ConstView&) {});
}

LossSums HeadLoss::take_sums() {
  LossSums sums{};
  device_.download(sums.data(), sums_.view());
  device_.zero(sums_.view());
  return sums;
}

}  // namespace distill
