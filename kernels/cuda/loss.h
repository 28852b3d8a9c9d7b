// Device::distill_loss on a GPU: the passes of kernels/loss_rows.h, a block per position. Host code.
#pragma once

#include "core/communicator.h"
#include "core/device.h"
#include "kernels/cuda/cuda_memory.h"

namespace distill::cuda {

struct LossCall {
  View dlogits, terms;
  ConstView student, teacher, labels;
  const LossSpec& spec;
  float scale;
  std::int64_t first, columns;  // real columns here, from this id on
  Communicator* group;          // null: the vocabulary is not cut
  // What passes need beyond the operands.
  Staging& staging;
  DeviceScratch& scratch;
  cudaStream_t stream;
};

// S: float or double, what is calculated in and what the student's logits are; T: the teacher's type. One instantiation
// per file loss_*.cu.
template <class S, class T>
void run_loss(const LossCall& call);
extern template void run_loss<float, float>(const LossCall&);
extern template void run_loss<float, bf16>(const LossCall&);
extern template void run_loss<float, f16>(const LossCall&);
extern template void run_loss<double, double>(const LossCall&);

}  // namespace distill::cuda
