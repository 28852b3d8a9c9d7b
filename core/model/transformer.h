// A decoder-only transformer (Qwen2, Qwen3, Llama 3, Mistral), forward and backward by hand. Residual stream x, two
// branches a block: attention and a gated feed-forward layer, each behind an RMS norm. Shapes: core/device.h; N, K and
// F are those of this tensor-parallel rank, and T' are the rows of the residual stream that it holds.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "core/device.h"
#include "core/model/params.h"
#include "core/model/tensor_parallel.h"

namespace distill {

// A micro-batch on the device.
struct DeviceBatch {
  ConstView tokens, positions;  // i32 [1, T]
  Segments segments;
  ConstView supervised;  // i32 [1, C]: rows whose next token is labelled
  std::int64_t token_count() const { return tokens.cols; }
  std::int64_t supervised_count() const { return supervised.cols; }
};

// What a block's backward needs of its forward, by name. Rows are tokens.
struct BlockActivations {
  View normed;   // [T', H]          norm of the block's input
  View inv_rms;  // [T', 1]
  View qkv;      // [T, (N+2K)·D]    q | k | v; q and k rotated in place unless they are normalised first
  View qk, q_inv_rms, k_inv_rms;  // [T, (N+K)·D], [T, N], [T, K]: normalised and rotated (qk_norm only)
  View attended, log_sum;         // [T, N·D], [T, N]
  View middle;                    // [T', H]          x + attention branch
  View middle_normed;             // [T', H]
  View middle_inv_rms;            // [T', 1]
  View gate_up, gated;            // [T, 2F], [T, F]
};

// Parameters of a block as matrices; fused ones are neighbours in the storage.
struct BlockParams {
  View input_norm;      // [1, H]
  View qkv, qkv_bias;   // [(N+2K)·D, H], [1, (N+2K)·D] or empty
  View q_norm, k_norm;  // [1, D] or empty
  View output;          // [H, N·D]
  View middle_norm;     // [1, H]
  View gate_up;         // [2F, H]
  View down;            // [H, F]
};

// The same for the part of a model that a rank holds; what it does not hold is empty.
struct ModelParams {
  View embedding;  // [V, H]
  std::vector<BlockParams> blocks;
  View norm;  // [1, H]
  View head;  // [V, H]; the embedding where they are tied
};

// Where a rank stands in the grid: what it holds, and with whom it holds it.
struct ModelPlace {
  ModelPart part;
  Communicator* tp = nullptr;  // null: alone
  int bucket_parts = 1;        // data-parallel ranks that share out each bucket of gradients
};

class Transformer {
 public:
  struct Limits {
    std::int64_t tokens = 0, supervised = 0;  // of the largest micro-batch
    int longest = 0;                          // longest sequence: positions 0 … longest − 1
    bool trains = false;                      // false: no gradients, no memory for a backward
    Recompute recompute = Recompute::full;
    int in_flight = 1;  // micro-batches whose forward is done and whose backward is not, at most
  };

  // Values are uninitialised, gradients zero.
  Transformer(Device& device, const ModelSpec& spec, DType dtype, const Limits& limits);
  Transformer(Device& device, const ModelSpec& spec, DType dtype, const Limits& limits, const ModelPlace& place);

  const ModelSpec& spec() const { return spec_; }
  const ModelPart& part() const { return part_; }
  const TensorParallel& tp() const { return tp_; }
  const ParamTable& table() const { return table_; }
  DType dtype() const { return values_.view().dtype; }
  View values() { return values_.view(); }        // flat [1, storage_size]
  View gradients() { return gradients_.view(); }  // the same shape, wide; empty unless it trains
  std::size_t activation_bytes() const { return arena_.capacity(); }

  // Micro-batches are numbered m = 0, 1, … within a step; `in_flight` of them may be between forward and backward.

  // Where the residual stream of the stage before belongs, [T', H]; not on the first stage. One may be filled while
  // in_flight others are in use.
  View stage_input(std::int64_t tokens, int m) const { return input(m, 0, tokens); }
  // On the last stage the hidden states of the supervised positions after the final norm, [C, H], the same on every
  // tensor-parallel rank; on others the residual stream for the next stage, [T', H]. Valid until the micro-batch's
  // backward, or for in_flight forwards of a model that does not train.
  View forward(const DeviceBatch& batch, int m = 0);

  // Where the gradient of what forward() returned belongs on a stage that is not the last, [T', H]. Two alternate:
  // valid until the next but one backward.
  View output_gradient(std::int64_t tokens) const { return residual_gradient(tokens); }
  // dhidden [C, H]: gradient of the loss with respect to what the last stage's forward returned, summed over the
  // tensor-parallel ranks; ignored elsewhere. Adds to gradients(). Returns the gradient of the stage's input, [T', H].
  // `ready` is called with each bucket of gradients (ParamTable::buckets) that has got all that this micro-batch adds.
  using BucketReady = std::function<void(std::size_t bucket)>;
  View backward(const DeviceBatch& batch, const ConstView& dhidden, int m = 0, const BucketReady& ready = {});

  // The first `columns` rows of the output head, [columns, H], and their gradient.
  ConstView head(std::int64_t columns) const { return params_.head.row_slice(0, columns); }
  View head_gradient(std::int64_t columns) const { return dparams_.head.row_slice(0, columns); }

 private:
  // What a micro-batch leaves behind for its backward.
  struct Slot {
    std::vector<View> inputs;              // inputs of the blocks but the first, and the stage's output [T', H]; all
                                           // one and the same without a backward
    std::vector<BlockActivations> blocks;  // what is kept, one a block; views of nothing for what is not
    View last, hidden, last_inv_rms;       // [C, H] supervised rows of the last block's output and their norm
  };
  // Activations and scratch for the largest micro-batch; a smaller one uses the first rows.
  struct Workspace {
    std::vector<View> stage_inputs;  // [T', H], one more than slots, so that one can be received meanwhile
    std::vector<Slot> slots;
    BlockActivations transient;    // what is not kept, shared by all blocks
    View branch;                   // [T', H] output of a branch before it joins the residual stream
    View whole, partial;           // [T, H] where tokens are cut: gathered rows; sums to be scattered
    View dlast;                    // backward only, from here on: [C, H]
    View dx[2], dmiddle, dnormed;  // [T', H]
    View dattended, dqk, dqkv;     // [T, N·D], [T, (N+K)·D] (qk_norm only), [T, (N+2K)·D]
    View dgated, dgate_up;         // [T, F], [T, 2F]
  };

  int layers_here() const { return part_.end_layer - part_.first_layer; }
  void plan(Workspace& work, Arena& arena) const;
  BlockActivations plan_block(Arena& arena, bool kept) const;
  void make_rope_table();
  ModelParams model_params(const View& flat) const;
  const Slot& slot(int m) const { return work_.slots[std::size_t(m) % work_.slots.size()]; }
  View input(int m, int layer, std::int64_t tokens) const;
  BlockActivations activations(int m, int layer, std::int64_t tokens) const;
  View residual_gradient(std::int64_t tokens) const;
  std::size_t bucket_of_layer(int layer) const { return std::size_t(layer) + (part_.has_embedding ? 1 : 0); }

  // Rows of all tokens of what this rank holds of them, and the place where a branch leaves its partial sums.
  View all_tokens(const View& own, std::int64_t tokens) const;
  View partial_of(const View& own, std::int64_t tokens) const;

  struct Heads {
    View q, k, v;
  };
  Heads heads(const View& qkv, const View& qk) const;
  AttentionShape attention_shape() const;
  std::int64_t q_cols() const { return std::int64_t(q_heads_) * spec_.head_dim; }
  std::int64_t kv_cols() const { return std::int64_t(kv_heads_) * spec_.head_dim; }

  void qkv_forward(const BlockParams& w, const BlockActivations& a, const DeviceBatch& batch);
  void attend(const BlockParams& w, const BlockActivations& a, const DeviceBatch& batch);
  void attention_backward(const BlockParams& w, const BlockParams& dw, const BlockActivations& a,
                          const DeviceBatch& batch);
  void block_to_gate(const BlockParams& w, const BlockActivations& a, const DeviceBatch& batch, View x);
  void block_forward(int m, int layer, const DeviceBatch& batch);
  void recompute_block(int m, int layer, const DeviceBatch& batch);
  void block_backward(int m, int layer, const DeviceBatch& batch, View dx);
  void tail_backward(int m, const DeviceBatch& batch, const ConstView& dhidden, View dx);

  Device& device_;
  ModelSpec spec_;  // of the whole model
  ModelPart part_;
  std::unique_ptr<Communicator> alone_;  // where no group was given
  TensorParallel tp_;
  int q_heads_, kv_heads_;     // here
  std::int64_t feed_forward_;  // here
  Limits limits_;
  ParamTable table_;
  Tensor values_, gradients_;
  ModelParams params_, dparams_;  // views of the two
  Tensor rope_table_;             // wide [longest, D]
  Arena arena_;
  Workspace work_;
  int transient_of_ = -1;   // the micro-batch whose last block the transient activations are, or −1
  unsigned backwards_ = 0;  // which of the two residual gradients is next
};

}  // namespace distill
