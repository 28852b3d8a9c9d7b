#include "kernels/cuda/attention.h"

#include "kernels/cuda/cuda_device.h"

namespace distill {

using namespace cuda;

void CudaDevice::do_attention(View out, View log_sum, const ConstView& q, const ConstView& k, const ConstView& v,
                              const Segments& segments, const AttentionShape& shape) {
  if (q.rows == 0) return;
  const AttentionCall call{q, k, v, segments, shape};
  if (library_attention_ && library_attention_->forward(call, out, log_sum)) return;
  with_float_type(q.dtype, [&](auto t) { run_attention<decltype(t)>(call, out, log_sum, stream()); });
}

void CudaDevice::do_attention_backward(View dq, View dk, View dv, const ConstView& dout, const ConstView& q,
                                       const ConstView& k, const ConstView& v, const ConstView& out,
                                       const ConstView& log_sum, const Segments& segments,
                                       const AttentionShape& shape) {
  if (q.rows == 0) return;
  const AttentionCall call{q, k, v, segments, shape};
  if (library_attention_ && library_attention_->backward(call, dq, dk, dv, dout, out, log_sum)) return;
  with_float_type(q.dtype, [&](auto t) {
    using T = decltype(t);
    void* const delta = scratch<Compute<T>>(q.rows * shape.q_heads);
    run_attention_backward<T>(call, dq, dk, dv, dout, out, log_sum, delta, stream());
  });
}

}  // namespace distill
