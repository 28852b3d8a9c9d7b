// The CPU backend: oneDNN for matrix products, OpenMP over rows, blocked attention. See kernels/README.md.
#pragma once

#include <memory>
#include <vector>

#include "core/device.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/loss.h"
#include "kernels/cpu/scratch.h"

namespace distill {

class CpuDevice final : public Device {
 public:
  explicit CpuDevice(int threads);

  std::string name() const override { return "cpu"; }
  int threads() const override { return threads_; }
  double peak_memory() const override;
  Buffer allocate(std::size_t bytes) override;
  void upload(View to, const void* host) override;
  void download(void* host, const ConstView& from) override;
  void synchronize() override {}

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
  void do_rms_norm_backward_add(View dx, View dw, const ConstView& dy, const ConstView& dskip, const ConstView& x,
                                const ConstView& w, const ConstView& inv_rms) override;
  void do_add_rms_norm(View sum, View y, View inv_rms, const ConstView& x, const ConstView& delta, const ConstView& w,
                       float eps) override;
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

  // dskip may be null.
  void norm_backward(View dx, View dw, const ConstView& dy, const ConstView* dskip, const ConstView& x,
                     const ConstView& w, const ConstView& inv_rms);

  int threads_;
  MatrixProduct product_;
  LossScratch loss_scratch_;
  Scratch shared_scratch_;
  std::vector<Scratch> attention_scratch_;  // one per thread, and one for the plan
};

}  // namespace distill
