// What a decoder-only transformer looks like: sizes and the few switches by which the families differ.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace distill {

// Rotary frequencies rescaled for long contexts as Llama 3.1 does (transformers: rope type "llama3").
struct Llama3RopeScaling {
  double factor = 8, low_freq_factor = 1, high_freq_factor = 4;
  std::int64_t original_max_positions = 8192;
};

// What the backward finds of the forward.
enum class Recompute {
  none,      // every activation is kept
  full,      // only each block's input is kept; the backward runs the block's forward again
  selective  // attention and activation functions are run again, products are kept
};

struct ModelSpec {
  std::string family;           // model_type of config.json: qwen2, qwen3, llama, mistral
  std::int64_t vocabulary = 0;  // rows of the embedding, padding included
  std::int64_t hidden = 0;
  std::int64_t feed_forward = 0;
  int layers = 0, q_heads = 0, kv_heads = 0, head_dim = 0;
  float norm_eps = 1e-6f;
  bool qkv_bias = false;   // q, k and v products have a bias (Qwen2)
  bool qk_norm = false;    // q and k are RMS-normalised per head before the rotation (Qwen3)
  bool tied_head = false;  // the output head is the embedding table
  double rope_theta = 10000;
  std::optional<Llama3RopeScaling> rope_scaling;
  int sliding_window = 0;  // 0: none
  std::int64_t max_positions = 0;
  double initializer_range = 0.02;

  std::int64_t q_cols() const { return std::int64_t(q_heads) * head_dim; }
  std::int64_t kv_cols() const { return std::int64_t(kv_heads) * head_dim; }
};

}  // namespace distill
