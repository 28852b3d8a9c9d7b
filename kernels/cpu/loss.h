// Device::distill_loss on the CPU: rows in parallel, every row by one thread, so the result does not depend on their
// number.
#pragma once

#include <vector>

#include "core/distill/loss_spec.h"
#include "core/tensor.h"
#include "kernels/cpu/loss_simd.h"

namespace distill {

// Sums over columns of one position, and the logit of its label where that is one of them.
struct PositionSums {
  simd::RowSums columns;
  double label_logit = 0;
};

// What D needs of all columns beside their sums: adaptive_kl the gaps, an objective that is not linear in the sums its
// own.
struct DivergenceParts {
  simd::HeadTailGaps gaps = {};
  simd::DivergenceSums sums = {};
};

// Memory of the loss that a device keeps between calls; grows only.
struct LossScratch {
  // An entry that may be among the k largest: its readable logits.
  struct Candidate {
    float teacher = 0, student = 0;
    std::int32_t id = 0;
  };
  std::vector<simd::Scratch> threads;
  // Of a vocabulary that is cut over ranks.
  std::vector<PositionSums> gathered_sums, sums;
  std::vector<Candidate> candidates;
  std::vector<std::uint64_t> least_kept;
  std::vector<simd::Boundary> boundaries;
  std::vector<DivergenceParts> parts;
  std::vector<double> statistics;
};

// Contract: core/device.h. f32 students by vector code, f64 ones (gradient checks) by the plain passes of loss_rows.h.
void distill_loss_cpu(View dlogits, View terms, const ConstView& student, const ConstView& teacher,
                      const ConstView& labels, const LossSpec& spec, float scale, int threads, LossScratch& scratch,
                      const VocabularyShard& shard = {});

}  // namespace distill
