// Small models of every family and small random batches, for tests that need a whole model.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/model/transformer.h"
#include "core/train/batch_on_device.h"
#include "core/train/data_source.h"

namespace distill::test {

inline ModelSpec tiny_spec(const std::string& family, bool tied) {
  ModelSpec s;
  s.family = family;
  s.vocabulary = 40;
  s.hidden = 24;
  s.feed_forward = 40;
  s.layers = 3;
  s.q_heads = 6;
  s.kv_heads = 2;
  s.head_dim = family == "qwen3" ? 8 : 4;
  s.norm_eps = 1e-5f;
  s.qkv_bias = family == "qwen2";
  s.qk_norm = family == "qwen3";
  s.tied_head = tied;
  s.rope_theta = 1000;
  if (family == "llama")
    s.rope_scaling =
        Llama3RopeScaling{.factor = 4, .low_freq_factor = 1, .high_freq_factor = 4, .original_max_positions = 8};
  if (family == "mistral") s.sliding_window = 3;
  s.max_positions = 64;
  return s;
}

// The same with sizes that grids can cut: 8 heads, 2 key/value heads, 5 layers.
inline ModelSpec wide_spec(const std::string& family, bool tied) {
  ModelSpec s = tiny_spec(family, tied);
  s.q_heads = 8;
  s.layers = 5;
  return s;
}

// Weights that are large enough for every path to matter: norms around 1, biases not 0.
// A part of a model gets that part of the whole one's.
inline void randomise(Device& device, Transformer& model, std::uint64_t seed, float std = 0.3f) {
  for (const Param& p : model.table().all()) {
    const View v = p.in(model.values());
    for (std::int64_t r = 0; r < p.rows; ++r)
      device.fill_normal(v.row_slice(r, 1), seed, std::uint64_t(p.index),
                         (p.first_row + r) * p.whole_cols + p.first_col, std);
    if (p.init == Init::ones) {
      Tensor ones = device.tensor(p.rows, p.cols, DType::f64);
      const std::vector<double> host(std::size_t(p.size()), 1.0);
      device.upload(ones.view(), host.data());
      Tensor same_type = device.tensor(p.rows, p.cols, v.dtype);
      device.cast(same_type.view(), ones.view());
      device.add(v, v, same_type.view());
    }
  }
}

// `count` samples of 2 to 12 tokens with prompts of 1 token and more.
inline Samples random_samples(int count, int vocabulary, unsigned seed) {
  std::mt19937 random(seed);
  SampleBuilder samples;
  for (int i = 0; i < count; ++i) {
    std::vector<std::int32_t> tokens(2 + random() % 11);
    for (std::int32_t& token : tokens) token = std::int32_t(random() % unsigned(vocabulary));
    samples.add(tokens, std::int32_t(1 + random() % (tokens.size() - 1)));
  }
  return std::move(samples).finish();
}

inline std::vector<std::int32_t> all_indices(const Samples& samples) {
  std::vector<std::int32_t> indices(std::size_t(samples.size()));
  for (std::size_t i = 0; i < indices.size(); ++i) indices[i] = std::int32_t(i);
  return indices;
}

inline Transformer::Limits limits_of(const MicroBatch& batch, Recompute recompute = Recompute::none) {
  return {.tokens = std::int64_t(batch.tokens.size()),
          .supervised = std::int64_t(batch.supervised.size()),
          .longest = int(batch.longest),
          .trains = true,
          .recompute = recompute};
}

// A flat storage on the host.
template <class T>
std::vector<T> download(Device& device, const ConstView& v) {
  std::vector<T> host(std::size_t(v.size()));
  device.download(host.data(), v);
  return host;
}

}  // namespace distill::test
