// The CUDA backend: cuBLASLt for matrix products, own kernels for all else, one stream for everything. See README.md.
#pragma once

#include <memory>
#include <string>

#include "core/device.h"
#include "kernels/backends.h"
#include "kernels/cuda/cuda_memory.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/library_attention.h"

namespace distill {

// A process uses one GPU, made current by the constructor for the thread that calls it: the thread that runs the
// operations. op_times() has the time in which the host put the work on the stream, not the time it took.
class CudaDevice final : public Device {
 public:
  // ordinal: among the GPUs that this process may see.
  explicit CudaDevice(int ordinal, const CudaOptions& options = {});
  ~CudaDevice() override;

  std::string name() const override { return name_; }
  int threads() const override { return 1; }  // no sum depends on a number of threads
  double peak_memory() const override { return double(use_->peak()); }
  Buffer allocate(std::size_t bytes) override { return cuda::allocate(use_, bytes, name_); }
  void upload(View to, const void* host) override;
  void download(void* host, const ConstView& from) override;
  void synchronize() override;
  void* native_stream() const override { return stream_.get(); }

 private:
  void do_zero(View x) override;
  void do_cast(View to, const ConstView& from) override;
  void do_add(View sum, const ConstView& a, const ConstView& b) override;
  void do_add_bias(View x, const ConstView& bias) override;
  void do_gather_rows(View out, const ConstView& x, const ConstView& rows) override;
  void do_scatter_rows(View out, const ConstView& x, const ConstView& rows) override;
  void do_fill_normal(View x, std::uint64_t seed, std::uint64_t tensor, std::int64_t first, float std) override;
  void do_column_sums(View sums, const ConstView& x) override;
  void do_sum_of_squares(View sum, const ConstView& x) override;
  void do_gemm(View c, const Factor& a, const Factor& b, Write write) override;
  void do_embedding(View out, const ConstView& table, const ConstView& ids, std::int32_t first_id) override;
  void do_embedding_backward(View dtable, const ConstView& dout, const ConstView& ids, std::int32_t first_id) override;
  void do_rms_norm(View y, View inv_rms, const ConstView& x, const ConstView& w, float eps) override;
  void do_rms_norm_backward(View dx, View dw, const ConstView& dy, const ConstView& x, const ConstView& w,
                            const ConstView& inv_rms) override;
  void do_add_rms_norm(View sum, View y, View inv_rms, const ConstView& x, const ConstView& delta, const ConstView& w,
                       float eps) override;
  void do_rms_norm_backward_add(View dx, View dw, const ConstView& dy, const ConstView& dskip, const ConstView& x,
                                const ConstView& w, const ConstView& inv_rms) override;
  void do_rope(View x, const ConstView& positions, const ConstView& table, int head_dim, bool inverse) override;
  void do_attention(View out, View log_sum, const ConstView& q, const ConstView& k, const ConstView& v,
                    const Segments& segments, const AttentionShape& shape) override;
  void do_attention_backward(View dq, View dk, View dv, const ConstView& dout, const ConstView& q, const ConstView& k,
                             const ConstView& v, const ConstView& out, const ConstView& log_sum,
                             const Segments& segments, const AttentionShape& shape) override;
  void do_swiglu(View y, const ConstView& gate_up) override;
  void do_swiglu_backward(View dgate_up, const ConstView& dy, const ConstView& gate_up) override;
  void do_distill_loss(View dlogits, View terms, const ConstView& student, const ConstView& teacher,
                       const ConstView& labels, const LossSpec& spec, float scale,
                       const VocabularyShard& shard) override;
  void do_adamw(View param, View master, View m, View v, const ConstView& grad, const AdamWStep& step) override;

  // delta, sum and dskip may be without data.
  void norm(View sum, View y, View inv_rms, const ConstView& x, const ConstView& delta, const ConstView& w, float eps);
  void norm_backward(View dx, View dw, const ConstView& dy, const ConstView& dskip, const ConstView& x,
                     const ConstView& w, const ConstView& inv_rms);

  void wait_watched();
  cudaStream_t stream() const { return stream_.get(); }
  // Valid until the next call, for work on the stream.
  template <class T>
  T* scratch(std::int64_t count) {
    return static_cast<T*>(scratch_.bytes(std::size_t(count) * sizeof(T)));
  }

  std::string name_;
  std::shared_ptr<cuda::MemoryUse> use_ = std::make_shared<cuda::MemoryUse>();
  cuda::Stream stream_;
  cuda::Event all_done_;
  cuda::Staging staging_;
  cuda::DeviceScratch scratch_;
  cuda::MatrixProduct product_;
  std::unique_ptr<cuda::LibraryAttention> library_attention_;  // may be null
};

}  // namespace distill
