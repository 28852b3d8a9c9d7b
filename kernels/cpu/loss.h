// Device::distill_loss on the CPU: rows in parallel, every row by one thread, so the result does not depend on their
// number.
#pragma once

#include <vector>

#include "core/distill/loss_spec.h"
#include "core/tensor.h"
#include "kernels/cpu/loss_simd.h"

namespace distill {

// Memory of the loss that a device keeps between calls; grows only.
struct LossScratch {
  std::vector<simd::Scratch> threads;
};

// Contract: core/device.h. f32 students by vector code, f64 ones (gradient checks) by the plain passes of loss_rows.h.
void distill_loss_cpu(View dlogits, View terms, const ConstView& student, const ConstView& teacher,
                      const ConstView& labels, const LossSpec& spec, float scale, int threads, LossScratch& scratch);

}  // namespace distill
