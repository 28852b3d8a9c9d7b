// The contract a backend fulfils. Public methods check shapes and time the operation, private virtuals do the work, so
// an operation a backend lacks does not compile. Outputs come first. Work on one device runs in order; only
// synchronize(), download() and the timing of an asynchronous backend block the host. See kernels/README.md.
//
// Sizes in comments: T tokens, H hidden, F feed-forward, N query heads, K key/value heads, D head size, S sequences,
// C positions of a chunk, V vocabulary columns. "any" stands for f32, bf16, f16 or f64, the same for all operands of a
// call; "wide" is f64 when the others are f64 and f32 otherwise. Gradients of parameters are wide and accumulated (+=).
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/distill/loss_spec.h"
#include "core/tensor.h"

namespace distill {

constexpr DType wide_type(DType type) { return type == DType::f64 ? DType::f64 : DType::f32; }

// A factor of a matrix product, perhaps transposed.
struct Factor {
  ConstView matrix;
  bool is_transposed = false;
  Factor(const ConstView& m, bool t = false) : matrix(m), is_transposed(t) {}
  std::int64_t rows() const { return is_transposed ? matrix.cols : matrix.rows; }
  std::int64_t cols() const { return is_transposed ? matrix.rows : matrix.cols; }
};
inline Factor transposed(const ConstView& m) { return {m, true}; }

enum class Write { overwrite, accumulate };

struct AttentionShape {
  int q_heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 0;  // softmax(scale · q kᵀ)
  int window = 0;   // > 0: position t sees only (t − window, t] (sliding window); 0: all of [0, t]
};

// Packed sequences: sequence s occupies rows [offsets[s], offsets[s+1]) of every activation.
struct Segments {
  ConstView offsets;  // i32 [1, S+1], on the device
  int longest = 0;    // longest sequence in tokens
  std::int64_t count() const { return offsets.cols - 1; }
};

// One AdamW update (Loshchilov & Hutter 2019, as torch.optim.AdamW): the gradient is multiplied by grad_scale first.
struct AdamWStep {
  double lr = 0, beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, weight_decay = 0;
  double bias_correction1 = 1, bias_correction2 = 1;  // 1 − betaᵢᵗ
  double grad_scale = 1;
};

// Seconds and calls of one operation, and its floating-point operations where that is a matrix product.
struct OpTime {
  double seconds = 0, flops = 0;
  std::int64_t calls = 0;
};

class Device {
 public:
  virtual ~Device() = default;
  Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  virtual std::string name() const = 0;  // "cpu", "cuda:0"
  virtual int threads()
      const = 0;  // compute threads; sums depend on it, so it belongs to what makes runs bit-identical
  virtual double peak_memory() const = 0;  // bytes: the most that this process has used so far
  // The stream that all work goes to, as the backend's library has it (cudaStream_t): for what orders itself with that
  // work by events. Null where work is done when a call returns.
  virtual void* native_stream() const { return nullptr; }

  // --- memory
  // ---------------------------------------------------------------------------------------------------------
  // Uninitialised, 64-byte aligned. Pages are only used once touched. Throws with the bytes asked for.
  virtual Buffer allocate(std::size_t bytes) = 0;
  Tensor tensor(std::int64_t rows, std::int64_t cols, DType dtype) {
    return {allocate(std::size_t(rows * cols) * size_of(dtype)), rows, cols, dtype};
  }
  virtual void upload(View to, const void* host) = 0;            // host memory is contiguous
  virtual void download(void* host, const ConstView& from) = 0;  // returns when the data is there
  virtual void synchronize() = 0;                                // returns when all work so far is done

  // While synchronize() or download() waits for this device, which may wait for other ranks, it asks what was added a
  // few times a second; what that throws ends the wait. `waited` is the time of this wait. The CPU never waits, and
  // asks none.
  using Watch = std::function<void(std::chrono::milliseconds waited)>;
  void add_watch(const void* owner, Watch watch) { watches_.emplace_back(owner, std::move(watch)); }
  void remove_watch(const void* owner) {
    std::erase_if(watches_, [owner](const auto& one) { return one.first == owner; });
  }

  // --- elementwise and moves
  // ------------------------------------------------------------------------------------------
  void zero(View x);
  void cast(View to, const ConstView& from);  // any to any floating type, same shape (a copy when equal)
  void add(View sum, const ConstView& a, const ConstView& b);             // any [T, H]; may be in place
  void add_bias(View x, const ConstView& bias);                           // any x [T, n] += bias [1, n]
  void gather_rows(View out, const ConstView& x, const ConstView& rows);  // out[i] = x[rows[i]], rows i32 [1, n]
  void scatter_rows(View out, const ConstView& x,
                    const ConstView& rows);  // out[rows[i]] = x[i], rows distinct, others kept
  void fill_normal(View x, std::uint64_t seed, std::uint64_t tensor, std::int64_t first, float std);
  // sums [1, n] += column sums of x [T, n]; sums is wide or f64, the order of additions depends on T only.
  void column_sums(View sums, const ConstView& x);
  // sum f64 [1, 1] += Σ x². NaN and infinity survive.
  void sum_of_squares(View sum, const ConstView& x);

  // --- products: c [m, n] (+)= a [m, k] b [k, n]; a and b of one type, c of that type or wide; f32 (f64) accumulation
  // ------
  void gemm(View c, const Factor& a, const Factor& b, Write write = Write::overwrite);

  // --- layers
  // --------------------------------------------------------------------------------------------------------- out [T,
  // H] = table[ids − first_id]; ids i32 [1, T]; an id outside the table's rows gives zeros (vocabulary-parallel).
  void embedding(View out, const ConstView& table, const ConstView& ids, std::int32_t first_id = 0);
  void embedding_backward(View dtable, const ConstView& dout, const ConstView& ids, std::int32_t first_id = 0);
  // Root mean square norm (Zhang & Sennrich 2019) over groups of n columns, n = w.cols: x, y any [T, G·n], w [1, n],
  // inv_rms f32/f64 (wide) [T, G]. G > 1 is the per-head norm of Qwen3. As in transformers, the normalised value is
  // rounded to the type of x before it is multiplied by w.
  void rms_norm(View y, View inv_rms, const ConstView& x, const ConstView& w, float eps);
  // dx overwritten (may be dy's memory), dw wide [1, n] accumulated.
  void rms_norm_backward(View dx, View dw, const ConstView& dy, const ConstView& x, const ConstView& w,
                         const ConstView& inv_rms);
  // sum = x + delta, y = rms_norm(sum). Backends may fuse them: x and delta are read once.
  void add_rms_norm(View sum, View y, View inv_rms, const ConstView& x, const ConstView& delta, const ConstView& w,
                    float eps);
  // dx = rms_norm_backward(dy) + dskip: the gradient that reaches the residual stream from both branches. dx may be
  // dy's memory.
  void rms_norm_backward_add(View dx, View dw, const ConstView& dy, const ConstView& dskip, const ConstView& x,
                             const ConstView& w, const ConstView& inv_rms);
  // What the two mean, by the separate operations: what a backend runs that does not fuse them, and what tests compare
  // one that does with.
  void plain_add_rms_norm(View sum, View y, View inv_rms, const ConstView& x, const ConstView& delta,
                          const ConstView& w, float eps);
  void plain_rms_norm_backward_add(View dx, View dw, const ConstView& dy, const ConstView& dskip, const ConstView& x,
                                   const ConstView& w, const ConstView& inv_rms);
  // Rotary embedding (Su et al. 2021) in place, halves convention of transformers: pair i is (i, i + D/2).
  // x any [T, heads·D]; positions i32 [1, T]; table wide [P, D] = cos (D/2 columns) then sin (D/2 columns).
  // inverse rotates back, which is also the backward.
  void rope(View x, const ConstView& positions, const ConstView& table, int head_dim, bool inverse = false);
  // Causal attention within each segment; q [T, N·D], k and v [T, K·D] (may be column slices of one matrix), out [T,
  // N·D], log_sum wide [T, N] = log Σ exp(scores), kept for the backward. Never forms T×T.
  void attention(View out, View log_sum, const ConstView& q, const ConstView& k, const ConstView& v,
                 const Segments& segments, const AttentionShape& shape);
  void attention_backward(View dq, View dk, View dv, const ConstView& dout, const ConstView& q, const ConstView& k,
                          const ConstView& v, const ConstView& out, const ConstView& log_sum, const Segments& segments,
                          const AttentionShape& shape);
  // y [T, F] = silu(gate) · up, gate_up [T, 2F] = (gate | up) (Shazeer 2020).
  void swiglu(View y, const ConstView& gate_up);
  void swiglu_backward(View dgate_up, const ConstView& dy, const ConstView& gate_up);

  // --- loss (design section 5; core/distill/loss_spec.h names the columns of `terms`)
  // --------------------------------------- For each of C positions, over the real vocabulary, the first
  // `spec.vocabulary` columns of both sides:
  //   terms wide [C, LossTerms::count]   unweighted parts of the loss and what metrics want to know
  //   dlogits [C, Vs] (type of the student's head) = scale · ∂/∂student ((1−w) CE + w D); padding columns get 0
  // student wide [C, Vs]; teacher any [C, Vt], or empty when spec.distill_weight is 0; labels i32 [1, C].
  // With the vocabulary cut over ranks (`shard`), every rank of the group calls with its columns and the same labels,
  // and gets the same terms, those of the whole vocabulary. Only statistics of positions travel, never logits.
  void distill_loss(View dlogits, View terms, const ConstView& student, const ConstView& teacher,
                    const ConstView& labels, const LossSpec& spec, float scale, const VocabularyShard& shard = {});

  // --- optimiser
  // ------------------------------------------------------------------------------------------------------ param any
  // [1, n]; master wide [1, n], or empty when param itself is wide; m, v, grad wide [1, n].
  void adamw(View param, View master, View m, View v, const ConstView& grad, const AdamWStep& step);

  // Time per operation since the last reset, by name; what "where the time went" prints.
  const std::map<std::string, OpTime, std::less<>>& op_times() const { return op_times_; }
  void reset_op_times() { op_times_.clear(); }

 protected:
  bool is_watched() const { return !watches_.empty(); }
  void ask_watches(std::chrono::milliseconds waited) const {
    for (const auto& [_, watch] : watches_) watch(waited);
  }

 private:
  // The timing zone of one public call.
  class Zone {
   public:
    Zone(Device& device, std::string_view op, double flops = 0);
    ~Zone();
    Zone(const Zone&) = delete;

   private:
    OpTime& time_;
    std::chrono::steady_clock::time_point start_;
  };

  virtual void do_zero(View x) = 0;
  virtual void do_cast(View to, const ConstView& from) = 0;
  virtual void do_add(View sum, const ConstView& a, const ConstView& b) = 0;
  virtual void do_add_bias(View x, const ConstView& bias) = 0;
  virtual void do_gather_rows(View out, const ConstView& x, const ConstView& rows) = 0;
  virtual void do_scatter_rows(View out, const ConstView& x, const ConstView& rows) = 0;
  virtual void do_fill_normal(View x, std::uint64_t seed, std::uint64_t tensor, std::int64_t first, float std) = 0;
  virtual void do_column_sums(View sums, const ConstView& x) = 0;
  virtual void do_sum_of_squares(View sum, const ConstView& x) = 0;
  virtual void do_gemm(View c, const Factor& a, const Factor& b, Write write) = 0;
  virtual void do_embedding(View out, const ConstView& table, const ConstView& ids, std::int32_t first_id) = 0;
  virtual void do_embedding_backward(View dtable, const ConstView& dout, const ConstView& ids,
                                     std::int32_t first_id) = 0;
  virtual void do_rms_norm(View y, View inv_rms, const ConstView& x, const ConstView& w, float eps) = 0;
  virtual void do_rms_norm_backward(View dx, View dw, const ConstView& dy, const ConstView& x, const ConstView& w,
                                    const ConstView& inv_rms) = 0;
  // The two that a backend may fuse.
  virtual void do_add_rms_norm(View sum, View y, View inv_rms, const ConstView& x, const ConstView& delta,
                               const ConstView& w, float eps) {
    plain_add_rms_norm(sum, y, inv_rms, x, delta, w, eps);
  }
  virtual void do_rms_norm_backward_add(View dx, View dw, const ConstView& dy, const ConstView& dskip,
                                        const ConstView& x, const ConstView& w, const ConstView& inv_rms) {
    plain_rms_norm_backward_add(dx, dw, dy, dskip, x, w, inv_rms);
  }
  virtual void do_rope(View x, const ConstView& positions, const ConstView& table, int head_dim, bool inverse) = 0;
  virtual void do_attention(View out, View log_sum, const ConstView& q, const ConstView& k, const ConstView& v,
                            const Segments& segments, const AttentionShape& shape) = 0;
  virtual void do_attention_backward(View dq, View dk, View dv, const ConstView& dout, const ConstView& q,
                                     const ConstView& k, const ConstView& v, const ConstView& out,
                                     const ConstView& log_sum, const Segments& segments,
                                     const AttentionShape& shape) = 0;
  virtual void do_swiglu(View y, const ConstView& gate_up) = 0;
  virtual void do_swiglu_backward(View dgate_up, const ConstView& dy, const ConstView& gate_up) = 0;
  virtual void do_distill_loss(View dlogits, View terms, const ConstView& student, const ConstView& teacher,
                               const ConstView& labels, const LossSpec& spec, float scale,
                               const VocabularyShard& shard) = 0;
  virtual void do_adamw(View param, View master, View m, View v, const ConstView& grad, const AdamWStep& step) = 0;

  std::map<std::string, OpTime, std::less<>> op_times_;
  std::vector<std::pair<const void*, Watch>> watches_;  // with their owners
};

// Planned memory: one allocation, views handed out in order. Sized once, never grows.
class Arena {
 public:
  Arena() = default;
  Arena(Device& device, std::size_t bytes) : memory_(device.allocate(bytes)), capacity_(bytes) {}
  // Hands out views of nothing and counts: how large the real one must be.
  static Arena measuring() {
    Arena arena;
    arena.capacity_ = SIZE_MAX;
    return arena;
  }

  // Uninitialised [rows, cols], 64-byte aligned.
  View make(std::int64_t rows, std::int64_t cols, DType dtype);
  std::size_t used() const { return used_; }
  std::size_t capacity() const { return capacity_; }

 private:
  Buffer memory_;
  std::size_t capacity_ = 0, used_ = 0;
};

}  // namespace distill
