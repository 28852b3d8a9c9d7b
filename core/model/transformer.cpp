#include "core/model/transformer.h"

#include <cmath>
#include <numbers>

namespace distill {

namespace {

View rows(const View& buffer, std::int64_t count) { return buffer.data ? buffer.row_slice(0, count) : buffer; }

// Rotation per position and pair, rad; in f32 as transformers computes it. [D/2]
std::vector<float> rope_frequencies(const ModelSpec& spec) {
  std::vector<float> frequencies;
  for (int i = 0; i < spec.head_dim; i += 2) {
    const float f = 1.0f / std::pow(float(spec.rope_theta), float(i) / float(spec.head_dim));
    if (!spec.rope_scaling) {
      frequencies.push_back(f);
      continue;
    }
    // Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between are interpolated.
    const Llama3RopeScaling& s = *spec.rope_scaling;
    const double wavelength = 2 * std::numbers::pi / f, original = double(s.original_max_positions);
    const double smooth = (original / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
    if (wavelength < original / s.high_freq_factor)
      frequencies.push_back(f);
    else if (wavelength > original / s.low_freq_factor)
      frequencies.push_back(float(f / s.factor));
    else
      frequencies.push_back(float((1 - smooth) * f / s.factor + smooth * f));
  }
  return frequencies;
}

}  // namespace

Transformer::Transformer(Device& device, const ModelSpec& spec, DType dtype, const Limits& limits)
    : device_(device), spec_(spec), limits_(limits), table_(param_table(spec)) {
  values_ = device.tensor(1, table_.storage_size(), dtype);
  device.zero(values_.view());
  if (limits.trains) {
    gradients_ = device.tensor(1, table_.storage_size(), wide_type(dtype));
    device.zero(gradients_.view());
    dparams_ = model_params(gradients_.view());
  }
  params_ = model_params(values_.view());
  make_rope_table();
  Arena measure = Arena::measuring();
  Workspace dry;
  plan(dry, measure);
  arena_ = Arena(device, measure.used());
  plan(work_, arena_);
}

void Transformer::make_rope_table() {
  const DType wide = wide_type(dtype());
  const int half = spec_.head_dim / 2;
  const std::vector<float> frequencies = rope_frequencies(spec_);
  std::vector<float> table(std::size_t(limits_.longest) * std::size_t(spec_.head_dim));
  for (int position = 0; position < limits_.longest; ++position) {
    float* row = table.data() + std::size_t(position) * std::size_t(spec_.head_dim);
    for (int i = 0; i < half; ++i) {
      const float angle = float(position) * frequencies[std::size_t(i)];
      row[i] = std::cos(angle);
      row[half + i] = std::sin(angle);
    }
  }
  Tensor narrow = device_.tensor(limits_.longest, spec_.head_dim, DType::f32);
  device_.upload(narrow.view(), table.data());
  rope_table_ = device_.tensor(limits_.longest, spec_.head_dim, wide);
  device_.cast(rope_table_.view(), narrow.view());
}

BlockActivations Transformer::plan_block(Arena& arena) const {
  const ModelSpec& s = spec_;
  const std::int64_t t = limits_.tokens;
  const DType type = dtype(), wide = wide_type(type);
  BlockActivations a;
  a.normed = arena.make(t, s.hidden, type);
  a.inv_rms = arena.make(t, 1, wide);
  a.qkv = arena.make(t, s.q_cols() + 2 * s.kv_cols(), type);
  if (s.qk_norm) {
    a.qk = arena.make(t, s.q_cols() + s.kv_cols(), type);
    a.q_inv_rms = arena.make(t, s.q_heads, wide);
    a.k_inv_rms = arena.make(t, s.kv_heads, wide);
  }
  a.attended = arena.make(t, s.q_cols(), type);
  a.log_sum = arena.make(t, s.q_heads, wide);
  a.middle = arena.make(t, s.hidden, type);
  a.middle_normed = arena.make(t, s.hidden, type);
  a.middle_inv_rms = arena.make(t, 1, wide);
  a.gate_up = arena.make(t, 2 * s.feed_forward, type);
  a.gated = arena.make(t, s.feed_forward, type);
  return a;
}

void Transformer::plan(Workspace& work, Arena& arena) const {
  const ModelSpec& s = spec_;
  const std::int64_t t = limits_.tokens, c = limits_.supervised;
  const DType type = dtype(), wide = wide_type(type);
  const int kept_inputs = limits_.trains ? s.layers + 1 : 2;
  for (int i = 0; i < kept_inputs; ++i) work.inputs.push_back(arena.make(t, s.hidden, type));
  const bool keep_all = limits_.trains && limits_.recompute == Recompute::none;
  for (int i = 0; i < (keep_all ? s.layers : 1); ++i) work.blocks.push_back(plan_block(arena));
  work.branch = arena.make(t, s.hidden, type);
  work.last = arena.make(c, s.hidden, type);
  work.hidden = arena.make(c, s.hidden, type);
  work.last_inv_rms = arena.make(c, 1, wide);
  if (!limits_.trains) return;
  work.dlast = arena.make(c, s.hidden, type);
  work.dx = arena.make(t, s.hidden, type);
  work.dmiddle = arena.make(t, s.hidden, type);
  work.dnormed = arena.make(t, s.hidden, type);
  work.dattended = arena.make(t, s.q_cols(), type);
  if (s.qk_norm) work.dqk = arena.make(t, s.q_cols() + s.kv_cols(), type);
  work.dqkv = arena.make(t, s.q_cols() + 2 * s.kv_cols(), type);
  work.dgated = arena.make(t, s.feed_forward, type);
  work.dgate_up = arena.make(t, 2 * s.feed_forward, type);
}

ModelParams Transformer::model_params(const View& flat) const {
  const auto view = [&](const std::string& name) {
    const Param* p = table_.find(name);
    return p ? p->in(flat) : View();
  };
  // `name` and its fused neighbours behind it, as one matrix of `count` rows (vectors: columns).
  const auto fused = [&](const std::string& name, std::int64_t count) {
    const Param* p = table_.find(name);
    if (!p) return View();
    const std::int64_t height = p->is_matrix ? count : 1, width = p->is_matrix ? p->cols : count;
    return flat.col_slice(p->offset, height * width).reshaped(height, width);
  };
  const std::int64_t qkv_cols = spec_.q_cols() + 2 * spec_.kv_cols();
  ModelParams params{.embedding = view("model.embed_tokens.weight"),
                     .blocks = {},
                     .norm = view("model.norm.weight"),
                     .head = view(spec_.tied_head ? "model.embed_tokens.weight" : "lm_head.weight")};
  for (int layer = 0; layer < spec_.layers; ++layer) {
    const std::string block = text("model.layers.", layer, "."), attention = block + "self_attn.", mlp = block + "mlp.";
    params.blocks.push_back({.input_norm = view(block + "input_layernorm.weight"),
                             .qkv = fused(attention + "q_proj.weight", qkv_cols),
                             .qkv_bias = fused(attention + "q_proj.bias", qkv_cols),
                             .q_norm = view(attention + "q_norm.weight"),
                             .k_norm = view(attention + "k_norm.weight"),
                             .output = view(attention + "o_proj.weight"),
                             .middle_norm = view(block + "post_attention_layernorm.weight"),
                             .gate_up = fused(mlp + "gate_proj.weight", 2 * spec_.feed_forward),
                             .down = view(mlp + "down_proj.weight")});
  }
  return params;
}

View Transformer::input(int layer, std::int64_t tokens) const {
  return rows(work_.inputs[std::size_t(layer) % work_.inputs.size()], tokens);
}

BlockActivations Transformer::activations(int layer, std::int64_t tokens) const {
  const BlockActivations& a = work_.blocks[std::size_t(layer) % work_.blocks.size()];
  return {.normed = rows(a.normed, tokens),
          .inv_rms = rows(a.inv_rms, tokens),
          .qkv = rows(a.qkv, tokens),
          .qk = rows(a.qk, tokens),
          .q_inv_rms = rows(a.q_inv_rms, tokens),
          .k_inv_rms = rows(a.k_inv_rms, tokens),
          .attended = rows(a.attended, tokens),
          .log_sum = rows(a.log_sum, tokens),
          .middle = rows(a.middle, tokens),
          .middle_normed = rows(a.middle_normed, tokens),
          .middle_inv_rms = rows(a.middle_inv_rms, tokens),
          .gate_up = rows(a.gate_up, tokens),
          .gated = rows(a.gated, tokens)};
}

namespace {

AttentionShape attention_shape(const ModelSpec& s) {
  return {.q_heads = s.q_heads,
          .kv_heads = s.kv_heads,
          .head_dim = s.head_dim,
          .scale = 1 / std::sqrt(float(s.head_dim)),
          .window = s.sliding_window};
}

// The parts of qkv [T, (N+2K)·D]; q and k come from `qk` where they are normalised.
struct Heads {
  View q, k, v;
};
Heads heads(const ModelSpec& s, const View& qkv, const View& qk) {
  const View& source = s.qk_norm ? qk : qkv;
  return {source.col_slice(0, s.q_cols()), source.col_slice(s.q_cols(), s.kv_cols()),
          qkv.col_slice(s.q_cols() + s.kv_cols(), s.kv_cols())};
}

}  // namespace

// normed → attended. qkv = normed W_qkvᵀ + b; q, k = norm (Qwen3), rotate; attended = softmax(q kᵀ / √D) v.
void Transformer::attention_forward(const BlockParams& w, const BlockActivations& a, const DeviceBatch& batch) {
  const std::int64_t q = spec_.q_cols(), k = spec_.kv_cols();
  device_.gemm(a.qkv, a.normed, transposed(w.qkv));
  if (w.qkv_bias.data) device_.add_bias(a.qkv, w.qkv_bias);
  if (spec_.qk_norm) {
    device_.rms_norm(a.qk.col_slice(0, q), a.q_inv_rms, a.qkv.col_slice(0, q), w.q_norm, spec_.norm_eps);
    device_.rms_norm(a.qk.col_slice(q, k), a.k_inv_rms, a.qkv.col_slice(q, k), w.k_norm, spec_.norm_eps);
  }
  device_.rope(spec_.qk_norm ? a.qk : a.qkv.col_slice(0, q + k), batch.positions, rope_table_.view(), spec_.head_dim);
  const Heads h = heads(spec_, a.qkv, a.qk);
  device_.attention(a.attended, a.log_sum, h.q, h.k, h.v, batch.segments, attention_shape(spec_));
}

// dattended → dnormed, and the gradients of W_qkv, its bias and the head norms.
void Transformer::attention_backward(const BlockParams& w, const BlockParams& dw, const BlockActivations& a,
                                     const DeviceBatch& batch) {
  const std::int64_t q = spec_.q_cols(), k = spec_.kv_cols(), t = batch.token_count();
  const View dqkv = rows(work_.dqkv, t), dqk = rows(work_.dqk, t), dnormed = rows(work_.dnormed, t);
  const Heads h = heads(spec_, a.qkv, a.qk), dh = heads(spec_, dqkv, dqk);
  device_.attention_backward(dh.q, dh.k, dh.v, rows(work_.dattended, t), h.q, h.k, h.v, a.attended, a.log_sum,
                             batch.segments, attention_shape(spec_));
  device_.rope(spec_.qk_norm ? dqk : dqkv.col_slice(0, q + k), batch.positions, rope_table_.view(), spec_.head_dim,
               /*inverse=*/true);
  if (spec_.qk_norm) {
    device_.rms_norm_backward(dqkv.col_slice(0, q), dw.q_norm, dh.q, a.qkv.col_slice(0, q), w.q_norm, a.q_inv_rms);
    device_.rms_norm_backward(dqkv.col_slice(q, k), dw.k_norm, dh.k, a.qkv.col_slice(q, k), w.k_norm, a.k_inv_rms);
  }
  if (w.qkv_bias.data) device_.column_sums(dw.qkv_bias, dqkv);
  device_.gemm(dw.qkv, transposed(dqkv), a.normed, Write::accumulate);
  device_.gemm(dnormed, dqkv, w.qkv);
}

View Transformer::forward(const DeviceBatch& batch) {
  const std::int64_t t = batch.token_count(), c = batch.supervised_count();
  check(t <= limits_.tokens && c <= limits_.supervised && batch.segments.longest <= limits_.longest, "micro-batch of ",
        t, " tokens, ", c, " supervised, longest ", batch.segments.longest, " exceeds the planned ", limits_.tokens,
        ", ", limits_.supervised, ", ", limits_.longest);
  const View branch = rows(work_.branch, t);
  device_.embedding(input(0, t), params_.embedding, batch.tokens);
  for (int layer = 0; layer < spec_.layers; ++layer) {
    const BlockParams& w = params_.blocks[std::size_t(layer)];
    const BlockActivations a = activations(layer, t);
    const View x = input(layer, t);
    if (layer == 0) device_.rms_norm(a.normed, a.inv_rms, x, w.input_norm, spec_.norm_eps);
    attention_forward(w, a, batch);
    device_.gemm(branch, a.attended, transposed(w.output));
    device_.add_rms_norm(a.middle, a.middle_normed, a.middle_inv_rms, x, branch, w.middle_norm, spec_.norm_eps);
    device_.gemm(a.gate_up, a.middle_normed, transposed(w.gate_up));
    device_.swiglu(a.gated, a.gate_up);
    device_.gemm(branch, a.gated, transposed(w.down));
    if (layer + 1 < spec_.layers) {  // the next block's norm rides on this block's residual sum
      const BlockActivations next = activations(layer + 1, t);
      device_.add_rms_norm(input(layer + 1, t), next.normed, next.inv_rms, a.middle, branch,
                           params_.blocks[std::size_t(layer) + 1].input_norm, spec_.norm_eps);
    } else {
      device_.add(input(layer + 1, t), a.middle, branch);
    }
  }
  const View last = rows(work_.last, c), hidden = rows(work_.hidden, c);
  device_.gather_rows(last, input(spec_.layers, t), batch.supervised);
  device_.rms_norm(hidden, rows(work_.last_inv_rms, c), last, params_.norm, spec_.norm_eps);
  return hidden;
}

// dx [T, H]: gradient at the block's output on entry, at its input on return.
void Transformer::block_backward(int layer, const DeviceBatch& batch, View dx) {
  const std::int64_t t = batch.token_count();
  const BlockParams &w = params_.blocks[std::size_t(layer)], &dw = dparams_.blocks[std::size_t(layer)];
  const BlockActivations a = activations(layer, t);
  const View x = input(layer, t), branch = rows(work_.branch, t);
  const bool kept =
      work_.blocks.size() > 1 || layer + 1 == spec_.layers;  // the last block's activations are still there
  if (!kept) {
    device_.rms_norm(a.normed, a.inv_rms, x, w.input_norm, spec_.norm_eps);
    attention_forward(w, a, batch);
    device_.gemm(branch, a.attended, transposed(w.output));
    device_.add_rms_norm(a.middle, a.middle_normed, a.middle_inv_rms, x, branch, w.middle_norm, spec_.norm_eps);
    device_.gemm(a.gate_up, a.middle_normed, transposed(w.gate_up));
    device_.swiglu(a.gated, a.gate_up);
  }
  const View dgated = rows(work_.dgated, t), dgate_up = rows(work_.dgate_up, t), dnormed = rows(work_.dnormed, t),
             dmiddle = rows(work_.dmiddle, t), dattended = rows(work_.dattended, t);
  device_.gemm(dw.down, transposed(dx), a.gated, Write::accumulate);
  device_.gemm(dgated, dx, w.down);
  device_.swiglu_backward(dgate_up, dgated, a.gate_up);
  device_.gemm(dw.gate_up, transposed(dgate_up), a.middle_normed, Write::accumulate);
  device_.gemm(dnormed, dgate_up, w.gate_up);
  device_.rms_norm_backward_add(dmiddle, dw.middle_norm, dnormed, dx, a.middle, w.middle_norm, a.middle_inv_rms);
  device_.gemm(dw.output, transposed(dmiddle), a.attended, Write::accumulate);
  device_.gemm(dattended, dmiddle, w.output);
  attention_backward(w, dw, a, batch);
  device_.rms_norm_backward_add(dx, dw.input_norm, dnormed, dmiddle, x, w.input_norm, a.inv_rms);
}

void Transformer::backward(const DeviceBatch& batch, const ConstView& dhidden) {
  check(limits_.trains, "backward of a model that does not train");
  const std::int64_t t = batch.token_count(), c = batch.supervised_count();
  const View dx = rows(work_.dx, t), dlast = rows(work_.dlast, c);
  device_.rms_norm_backward(dlast, dparams_.norm, dhidden, rows(work_.last, c), params_.norm,
                            rows(work_.last_inv_rms, c));
  device_.zero(dx);
  device_.scatter_rows(dx, dlast, batch.supervised);
  for (int layer = spec_.layers - 1; layer >= 0; --layer) block_backward(layer, batch, dx);
  device_.embedding_backward(dparams_.embedding, dx, batch.tokens);
}

}  // namespace distill
