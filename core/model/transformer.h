// A decoder-only transformer (Qwen2, Qwen3, Llama 3, Mistral), forward and backward by hand. Residual stream x, two
// branches a block: attention and a gated feed-forward layer, each behind an RMS norm. Shapes: core/device.h.
#pragma once

#include <vector>

#include "core/device.h"
#include "core/model/params.h"

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
  View normed;   // [T, H]           norm of the block's input
  View inv_rms;  // [T, 1]
  View qkv;      // [T, (N+2K)·D]    q | k | v; q and k rotated in place unless they are normalised first
  View qk, q_inv_rms, k_inv_rms;  // [T, (N+K)·D], [T, N], [T, K]: normalised and rotated (qk_norm only)
  View attended, log_sum;         // [T, N·D], [T, N]
  View middle;                    // [T, H]           x + attention branch
  View middle_normed;             // [T, H]
  View middle_inv_rms;            // [T, 1]
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

// The same for a whole model.
struct ModelParams {
  View embedding;  // [V, H]
  std::vector<BlockParams> blocks;
  View norm;  // [1, H]
  View head;  // [V, H]; the embedding where they are tied
};

class Transformer {
 public:
  struct Limits {
    std::int64_t tokens = 0, supervised = 0;  // of the largest micro-batch
    int longest = 0;                          // longest sequence: positions 0 … longest − 1
    bool trains = false;                      // false: no gradients, no memory for a backward
    Recompute recompute = Recompute::full;
  };

  // Values are uninitialised, gradients zero.
  Transformer(Device& device, const ModelSpec& spec, DType dtype, const Limits& limits);

  const ModelSpec& spec() const { return spec_; }
  const ParamTable& table() const { return table_; }
  DType dtype() const { return values_.view().dtype; }
  View values() { return values_.view(); }        // flat [1, storage_size]
  View gradients() { return gradients_.view(); }  // the same shape, wide; empty unless it trains
  std::size_t activation_bytes() const { return arena_.capacity(); }

  // Hidden states of the supervised positions after the final norm, [C, H]; valid until the next forward.
  View forward(const DeviceBatch& batch);
  // dhidden [C, H]: gradient of the loss with respect to what the last forward() of this batch returned. Adds to
  // gradients().
  void backward(const DeviceBatch& batch, const ConstView& dhidden);

  // The first `columns` rows of the output head, [columns, H], and their gradient.
  ConstView head(std::int64_t columns) const { return params_.head.row_slice(0, columns); }
  View head_gradient(std::int64_t columns) const { return dparams_.head.row_slice(0, columns); }

 private:
  // Activations and scratch for the largest micro-batch; a smaller one uses the first rows.
  struct Workspace {
    std::vector<View> inputs;              // block inputs x_0 … x_L [T, H]; two that alternate when it does not train
    std::vector<BlockActivations> blocks;  // one a block, or a single one that all blocks share
    View branch;                           // [T, H] output of the branch before it joins the residual stream
    View last, hidden, last_inv_rms;       // [C, H] supervised rows of x_L and their norm
    View dlast;                            // backward only, from here on: [C, H]
    View dx, dmiddle, dnormed;             // [T, H]
    View dattended, dqk, dqkv;             // [T, N·D], [T, (N+K)·D] (qk_norm only), [T, (N+2K)·D]
    View dgated, dgate_up;                 // [T, F], [T, 2F]
  };

  void plan(Workspace& work, Arena& arena) const;
  BlockActivations plan_block(Arena& arena) const;
  void make_rope_table();
  ModelParams model_params(const View& flat) const;
  View input(int layer, std::int64_t tokens) const;
  BlockActivations activations(int layer, std::int64_t tokens) const;

  void attention_forward(const BlockParams& w, const BlockActivations& a, const DeviceBatch& batch);
  void attention_backward(const BlockParams& w, const BlockParams& dw, const BlockActivations& a,
                          const DeviceBatch& batch);
  void block_backward(int layer, const DeviceBatch& batch, View dx);

  Device& device_;
  ModelSpec spec_;
  Limits limits_;
  ParamTable table_;
  Tensor values_, gradients_;
  ModelParams params_, dparams_;  // views of the two
  Tensor rope_table_;             // wide [longest, D]
  Arena arena_;
  Workspace work_;
};

}  // namespace distill
