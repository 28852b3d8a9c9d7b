// The output head fused with the loss, chunk by chunk: student logits of a few hundred positions exist at a time, never
// of a whole micro-batch.
#pragma once

#include <array>

#include "core/communicator.h"
#include "core/distill/loss_spec.h"
#include "core/model/transformer.h"
#include "core/train/logits_channel.h"

namespace distill {

// Sums over supervised positions of each column of LossTerms.
using LossSums = std::array<double, LossTerms::count>;

// Vocabulary columns computed of a head with `rows` rows: the real vocabulary, rounded up for the matrix product.
std::int64_t head_columns(std::int64_t real_vocabulary, std::int64_t rows);

// Positions per chunk when the configuration leaves it open: as many as keep logits and their gradient within a budget.
std::int64_t default_logits_chunk(std::int64_t columns, DType dtype);

class HeadLoss {
 public:
  // most_supervised: largest C of any micro-batch; chunk: positions at a time. group: the ranks over which the
  // vocabulary is cut, each with the head's rows and the teacher's columns of its vocabulary_part(); null: not cut.
  HeadLoss(Device& device, Transformer& student, const LossSpec& spec, std::int64_t chunk, std::int64_t most_supervised,
           Communicator* group = nullptr);

  // hidden [C, H] of the student, labels i32 [1, C]. Adds the head's gradient and returns dhidden [C, H]: both of
  // scale · Σ_c ((1−w) CE_c + w D_c). `teacher` gives the same positions in order; null when w is 0. Valid until the
  // next call. With a group every rank passes the same hidden states and labels and gets the same dhidden, summed over
  // the ranks' columns.
  ConstView forward_backward(const ConstView& hidden, const ConstView& labels, TeacherSource* teacher, double scale);
  // Only the sums of the terms: over the whole vocabulary, the same on every rank of the group.
  void forward(const ConstView& hidden, const ConstView& labels, TeacherSource* teacher);

  // What the calls since the last take_sums() added up.
  LossSums take_sums();

 private:
  struct Chunk;
  template <class AfterLoss>
  void for_each_chunk(const ConstView& hidden, const ConstView& labels, TeacherSource* teacher, double scale,
                      AfterLoss&& after_loss);

  Device& device_;
  Transformer& student_;
  LossSpec spec_;
  VocabularyShard shard_;
  std::int64_t chunk_, columns_;
  Tensor logits_;   // wide [chunk, columns]
  Tensor dlogits_;  // [chunk, columns] in the student's type
  Tensor terms_;    // wide [chunk, LossTerms::count]
  Tensor dhidden_;  // [C, H]
  Tensor sums_;     // f64 [1, LossTerms::count]
};

}  // namespace distill
