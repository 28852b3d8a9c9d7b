#include "kernels/cuda/loss.h"

#include <algorithm>

#include "kernels/cuda/cuda_device.h"

namespace distill {

using namespace cuda;

void CudaDevice::do_distill_loss(View dlogits, View terms, const ConstView& student, const ConstView& teacher,
                                 const ConstView& labels, const LossSpec& spec, float scale,
                                 const VocabularyShard& shard) {
  const bool is_f64 = student.dtype == DType::f64;
  check(is_f64 == (dlogits.dtype == DType::f64), "distill_loss: dlogits ", dlogits, " for student ", student);
  Communicator* const group = shard.group && shard.group->size() > 1 ? shard.group : nullptr;
  const std::int64_t columns =
      group ? std::clamp<std::int64_t>(spec.vocabulary - shard.first, 0, student.cols) : spec.vocabulary;
  // Only the terms are wanted: the gradient is 0.
  if (scale == 0) do_zero(dlogits);
  LossCall call{dlogits,     terms,   student, teacher,  labels,   spec,    scale,
                shard.first, columns, group,   staging_, scratch_, stream()};

  // Teachers whose type differs from an f64 student's, and f64 teachers of an f32 student, occur in tests only.
  const bool takes_as_is = teacher.dtype == DType::f64 ? is_f64 : !is_f64;
  Tensor converted;
  if (teacher.data && !takes_as_is) {
    converted = tensor(teacher.rows, teacher.cols, student.dtype);
    do_cast(converted.view(), teacher);
    call.teacher = converted.view();
  }
  if (is_f64) return run_loss<double, double>(call);
  switch (call.teacher.dtype) {
    case DType::bf16:
      return run_loss<float, bf16>(call);
    case DType::f16:
      return run_loss<float, f16>(call);
    default:
      return run_loss<float, float>(call);
  }
}

}  // namespace distill
