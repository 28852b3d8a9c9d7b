#include "core/model/transformer.h"

#include <cmath>
#include <numbers>

#include "core/out_of_memory.h"

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
    : Transformer(device, spec, dtype, limits, {.part = whole_model(spec)}) {}

Transformer::Transformer(Device& device, const ModelSpec& spec, DType dtype, const Limits& limits,
                         const ModelPlace& place)
    : device_(device),
      spec_(spec),
      part_(place.part),
      alone_(place.tp ? nullptr : std::make_unique<Alone>("tp")),
      tp_(place.tp ? *place.tp : *alone_, place.part.cuts_tokens),
      q_heads_(spec.q_heads / tp_.size()),
      kv_heads_(spec.kv_heads * kv_sharers(spec, tp_.size()) / tp_.size()),
      feed_forward_(spec.feed_forward / tp_.size()),
      limits_(limits),
      table_(param_table(spec, part_, place.bucket_parts)) {
  check(part_.tp_size == tp_.size() && part_.tp_rank == tp_.rank(), "a part of tensor-parallel rank ", part_.tp_rank,
        " of ", part_.tp_size, " in a group of rank ", tp_.rank(), " of ", tp_.size());
  values_ = with_memory_for("its parameters", [&] { return device.tensor(1, table_.storage_size(), dtype); });
  device.zero(values_.view());
  if (limits.trains) {
    gradients_ = with_memory_for(
        "its gradients", [&] { return device.tensor(1, table_.storage_size(), wide_type(dtype)); });
    device.zero(gradients_.view());
    dparams_ = model_params(gradients_.view());
  }
  params_ = model_params(values_.view());
  make_rope_table();
  Arena measure = Arena::measuring();
  Workspace dry;
  plan(dry, measure);
  arena_ = with_memory_for("its activations", [&] { return Arena(device, measure.used()); });
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

// kept: what the backward finds there; otherwise what all blocks share. Without recomputation everything is kept, with
// selective recomputation the products, with full recomputation nothing.
BlockActivations Transformer::plan_block(Arena& arena, bool kept) const {
  const Recompute recompute = limits_.trains ? limits_.recompute : Recompute::full;
  const bool has_products = kept == (recompute != Recompute::full), has_others = kept == (recompute == Recompute::none);
  const std::int64_t t = limits_.tokens, own = tp_.own_rows(t), hidden = spec_.hidden;
  const std::int64_t q = q_cols(), kv = kv_cols();
  const DType type = dtype(), wide = wide_type(type);
  BlockActivations a;
  if (has_products) {
    a.qkv = arena.make(t, q + 2 * kv, type);
    a.middle = arena.make(own, hidden, type);
    a.gate_up = arena.make(t, 2 * feed_forward_, type);
  }
  if (!has_others) return a;
  a.normed = arena.make(own, hidden, type);
  a.inv_rms = arena.make(own, 1, wide);
  if (spec_.qk_norm) {
    a.qk = arena.make(t, q + kv, type);
    a.q_inv_rms = arena.make(t, q_heads_, wide);
    a.k_inv_rms = arena.make(t, kv_heads_, wide);
  }
  a.attended = arena.make(t, q, type);
  a.log_sum = arena.make(t, q_heads_, wide);
  a.middle_normed = arena.make(own, hidden, type);
  a.middle_inv_rms = arena.make(own, 1, wide);
  a.gated = arena.make(t, feed_forward_, type);
  return a;
}

void Transformer::plan(Workspace& work, Arena& arena) const {
  const std::int64_t t = limits_.tokens, own = tp_.own_rows(t), c = limits_.supervised, hidden = spec_.hidden;
  const DType type = dtype(), wide = wide_type(type);
  const int layers = layers_here(), slots = limits_.in_flight;
  for (int i = 0; i < slots + (part_.has_embedding ? 0 : 1); ++i)
    work.stage_inputs.push_back(arena.make(own, hidden, type));
  for (int i = 0; i < slots; ++i) {
    Slot slot;
    for (int layer = 0; layer < (limits_.trains ? layers : 1); ++layer)
      slot.inputs.push_back(arena.make(own, hidden, type));
    for (int layer = 0; layer < (limits_.trains ? layers : 0); ++layer) slot.blocks.push_back(plan_block(arena, true));
    if (part_.has_head) {
      slot.last = arena.make(c, hidden, type);
      slot.hidden = arena.make(c, hidden, type);
      slot.last_inv_rms = arena.make(c, 1, wide);
    }
    work.slots.push_back(std::move(slot));
  }
  work.transient = plan_block(arena, false);
  work.branch = arena.make(own, hidden, type);
  if (tp_.cuts_tokens()) {
    work.whole = arena.make(t, hidden, type);
    work.partial = arena.make(t, hidden, type);
  }
  if (!limits_.trains) return;
  if (part_.has_head) work.dlast = arena.make(c, hidden, type);
  for (View& dx : work.dx) dx = arena.make(own, hidden, type);
  work.dmiddle = arena.make(own, hidden, type);
  work.dnormed = arena.make(own, hidden, type);
  work.dattended = arena.make(t, q_cols(), type);
  if (spec_.qk_norm) work.dqk = arena.make(t, q_cols() + kv_cols(), type);
  work.dqkv = arena.make(t, q_cols() + 2 * kv_cols(), type);
  work.dgated = arena.make(t, feed_forward_, type);
  work.dgate_up = arena.make(t, 2 * feed_forward_, type);
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
  ModelParams params;
  if (part_.has_embedding) params.embedding = view("model.embed_tokens.weight");
  if (part_.has_head) {
    params.norm = view("model.norm.weight");
    params.head = view(spec_.tied_head ? "model.embed_tokens.weight" : "lm_head.weight");
  }
  for (int layer = part_.first_layer; layer < part_.end_layer; ++layer) {
    const std::string block = text("model.layers.", layer, "."), attention = block + "self_attn.", mlp = block + "mlp.";
    params.blocks.push_back({.input_norm = view(block + "input_layernorm.weight"),
                             .qkv = fused(attention + "q_proj.weight", q_cols() + 2 * kv_cols()),
                             .qkv_bias = fused(attention + "q_proj.bias", q_cols() + 2 * kv_cols()),
                             .q_norm = view(attention + "q_norm.weight"),
                             .k_norm = view(attention + "k_norm.weight"),
                             .output = view(attention + "o_proj.weight"),
                             .middle_norm = view(block + "post_attention_layernorm.weight"),
                             .gate_up = fused(mlp + "gate_proj.weight", 2 * feed_forward_),
                             .down = view(mlp + "down_proj.weight")});
  }
  return params;
}

// Input of block `layer` (counted within the stage); that of the block after the last is the stage's output.
View Transformer::input(int m, int layer, std::int64_t tokens) const {
  const std::int64_t own = tp_.own_rows(tokens);
  if (layer == 0) return rows(work_.stage_inputs[std::size_t(m) % work_.stage_inputs.size()], own);
  return rows(slot(m).inputs[limits_.trains ? std::size_t(layer) - 1 : 0], own);
}

BlockActivations Transformer::activations(int m, int layer, std::int64_t tokens) const {
  const BlockActivations &shared = work_.transient,
                         kept = limits_.trains ? slot(m).blocks[std::size_t(layer)] : BlockActivations{};
  const auto here = [](const View& own, const View& other, std::int64_t n) { return rows(own.data ? own : other, n); };
  const std::int64_t own = tp_.own_rows(tokens);
  return {.normed = here(kept.normed, shared.normed, own),
          .inv_rms = here(kept.inv_rms, shared.inv_rms, own),
          .qkv = here(kept.qkv, shared.qkv, tokens),
          .qk = here(kept.qk, shared.qk, tokens),
          .q_inv_rms = here(kept.q_inv_rms, shared.q_inv_rms, tokens),
          .k_inv_rms = here(kept.k_inv_rms, shared.k_inv_rms, tokens),
          .attended = here(kept.attended, shared.attended, tokens),
          .log_sum = here(kept.log_sum, shared.log_sum, tokens),
          .middle = here(kept.middle, shared.middle, own),
          .middle_normed = here(kept.middle_normed, shared.middle_normed, own),
          .middle_inv_rms = here(kept.middle_inv_rms, shared.middle_inv_rms, own),
          .gate_up = here(kept.gate_up, shared.gate_up, tokens),
          .gated = here(kept.gated, shared.gated, tokens)};
}

View Transformer::residual_gradient(std::int64_t tokens) const {
  return rows(work_.dx[backwards_ % 2], tp_.own_rows(tokens));
}

View Transformer::all_tokens(const View& own, std::int64_t tokens) const {
  return tp_.gather(rows(work_.whole, tokens), own);
}

View Transformer::partial_of(const View& own, std::int64_t tokens) const {
  return tp_.cuts_tokens() ? rows(work_.partial, tokens) : own;
}

AttentionShape Transformer::attention_shape() const {
  return {.q_heads = q_heads_,
          .kv_heads = kv_heads_,
          .head_dim = spec_.head_dim,
          .scale = 1 / std::sqrt(float(spec_.head_dim)),
          .window = spec_.sliding_window};
}

// The parts of qkv [T, (N+2K)·D]; q and k come from `qk` where they are normalised.
Transformer::Heads Transformer::heads(const View& qkv, const View& qk) const {
  const View& source = spec_.qk_norm ? qk : qkv;
  return {source.col_slice(0, q_cols()), source.col_slice(q_cols(), kv_cols()),
          qkv.col_slice(q_cols() + kv_cols(), kv_cols())};
}

// normed → qkv = normed W_qkvᵀ + b; q and k are rotated in place unless they are normalised first.
void Transformer::qkv_forward(const BlockParams& w, const BlockActivations& a, const DeviceBatch& batch) {
  device_.gemm(a.qkv, all_tokens(a.normed, batch.token_count()), transposed(w.qkv));
  if (w.qkv_bias.data) device_.add_bias(a.qkv, w.qkv_bias);
  if (!spec_.qk_norm)
    device_.rope(a.qkv.col_slice(0, q_cols() + kv_cols()), batch.positions, rope_table_.view(), spec_.head_dim);
}

// qkv → attended = softmax(q kᵀ / √D) v, with q, k = rotated norms (Qwen3).
void Transformer::attend(const BlockParams& w, const BlockActivations& a, const DeviceBatch& batch) {
  const std::int64_t q = q_cols(), k = kv_cols();
  if (spec_.qk_norm) {
    device_.rms_norm(a.qk.col_slice(0, q), a.q_inv_rms, a.qkv.col_slice(0, q), w.q_norm, spec_.norm_eps);
    device_.rms_norm(a.qk.col_slice(q, k), a.k_inv_rms, a.qkv.col_slice(q, k), w.k_norm, spec_.norm_eps);
    device_.rope(a.qk, batch.positions, rope_table_.view(), spec_.head_dim);
  }
  const Heads h = heads(a.qkv, a.qk);
  device_.attention(a.attended, a.log_sum, h.q, h.k, h.v, batch.segments, attention_shape());
}

// dattended → dnormed, and the gradients of W_qkv, its bias and the head norms.
void Transformer::attention_backward(const BlockParams& w, const BlockParams& dw, const BlockActivations& a,
                                     const DeviceBatch& batch) {
  const std::int64_t q = q_cols(), k = kv_cols(), t = batch.token_count();
  const View dqkv = rows(work_.dqkv, t), dqk = rows(work_.dqk, t), dnormed = rows(work_.dnormed, tp_.own_rows(t));
  const Heads h = heads(a.qkv, a.qk), dh = heads(dqkv, dqk);
  device_.attention_backward(dh.q, dh.k, dh.v, rows(work_.dattended, t), h.q, h.k, h.v, a.attended, a.log_sum,
                             batch.segments, attention_shape());
  device_.rope(spec_.qk_norm ? dqk : dqkv.col_slice(0, q + k), batch.positions, rope_table_.view(), spec_.head_dim,
               /*inverse=*/true);
  if (spec_.qk_norm) {
    device_.rms_norm_backward(dqkv.col_slice(0, q), dw.q_norm, dh.q, a.qkv.col_slice(0, q), w.q_norm, a.q_inv_rms);
    device_.rms_norm_backward(dqkv.col_slice(q, k), dw.k_norm, dh.k, a.qkv.col_slice(q, k), w.k_norm, a.k_inv_rms);
  }
  if (w.qkv_bias.data) device_.column_sums(dw.qkv_bias, dqkv);
  device_.gemm(dw.qkv, transposed(dqkv), all_tokens(a.normed, t), Write::accumulate);
  const View partial = partial_of(dnormed, t);
  device_.gemm(partial, dqkv, w.qkv);
  tp_.sum(dnormed, partial);
}

// normed → gate_up: the attention branch, its sum with the block's input x, and the first product of the other branch.
void Transformer::block_to_gate(const BlockParams& w, const BlockActivations& a, const DeviceBatch& batch, View x) {
  const std::int64_t t = batch.token_count();
  const View branch = rows(work_.branch, tp_.own_rows(t)), partial = partial_of(branch, t);
  qkv_forward(w, a, batch);
  attend(w, a, batch);
  device_.gemm(partial, a.attended, transposed(w.output));
  tp_.sum(branch, partial);
  device_.add_rms_norm(a.middle, a.middle_normed, a.middle_inv_rms, x, branch, w.middle_norm, spec_.norm_eps);
  device_.gemm(a.gate_up, all_tokens(a.middle_normed, t), transposed(w.gate_up));
}

// The block's output joins the residual stream where the next block's norm, which rides on the sum, is at hand.
void Transformer::block_forward(int m, int layer, const DeviceBatch& batch) {
  const std::int64_t t = batch.token_count();
  const BlockParams& w = params_.blocks[std::size_t(layer)];
  const BlockActivations a = activations(m, layer, t);
  const View x = input(m, layer, t), branch = rows(work_.branch, tp_.own_rows(t)), partial = partial_of(branch, t);
  if (layer == 0) device_.rms_norm(a.normed, a.inv_rms, x, w.input_norm, spec_.norm_eps);
  block_to_gate(w, a, batch, x);
  device_.swiglu(a.gated, a.gate_up);
  device_.gemm(partial, a.gated, transposed(w.down));
  tp_.sum(branch, partial);
  if (layer + 1 == layers_here()) return device_.add(input(m, layer + 1, t), a.middle, branch);
  const BlockActivations next = activations(m, layer + 1, t);
  device_.add_rms_norm(input(m, layer + 1, t), next.normed, next.inv_rms, a.middle, branch,
                       params_.blocks[std::size_t(layer) + 1].input_norm, spec_.norm_eps);
}

View Transformer::forward(const DeviceBatch& batch, int m) {
  const std::int64_t t = batch.token_count(), c = batch.supervised_count();
  check(t <= limits_.tokens && c <= limits_.supervised && batch.segments.longest <= limits_.longest, "micro-batch of ",
        t, " tokens, ", c, " supervised, longest ", batch.segments.longest, " exceeds the planned ", limits_.tokens,
        ", ", limits_.supervised, ", ", limits_.longest);
  check(!tp_.cuts_tokens() || t % tp_.size() == 0, "micro-batch of ", t, " tokens over ", tp_.size(), " ranks");
  if (part_.has_embedding) {
    const View x = input(m, 0, t), partial = partial_of(x, t);
    device_.embedding(partial, params_.embedding, batch.tokens, std::int32_t(part_.vocabulary.first));
    tp_.sum(x, partial);
  }
  for (int layer = 0; layer < layers_here(); ++layer) block_forward(m, layer, batch);
  transient_of_ = m;
  const View out = input(m, layers_here(), t);
  if (!part_.has_head) return out;
  const View last = rows(slot(m).last, c), hidden = rows(slot(m).hidden, c);
  device_.gather_rows(last, all_tokens(out, t), batch.supervised);
  device_.rms_norm(hidden, rows(slot(m).last_inv_rms, c), last, params_.norm, spec_.norm_eps);
  return hidden;
}

// Runs again what the forward did not keep.
void Transformer::recompute_block(int m, int layer, const DeviceBatch& batch) {
  const std::int64_t t = batch.token_count();
  const BlockParams& w = params_.blocks[std::size_t(layer)];
  const BlockActivations a = activations(m, layer, t);
  const View x = input(m, layer, t);
  device_.rms_norm(a.normed, a.inv_rms, x, w.input_norm, spec_.norm_eps);
  if (limits_.recompute == Recompute::selective) {
    attend(w, a, batch);
    device_.rms_norm(a.middle_normed, a.middle_inv_rms, a.middle, w.middle_norm, spec_.norm_eps);
  } else {
    block_to_gate(w, a, batch, x);
  }
  device_.swiglu(a.gated, a.gate_up);
}

// dx [T', H]: gradient at the block's output on entry, at its input on return.
void Transformer::block_backward(int m, int layer, const DeviceBatch& batch, View dx) {
  const std::int64_t t = batch.token_count(), own = tp_.own_rows(t);
  const BlockParams &w = params_.blocks[std::size_t(layer)], &dw = dparams_.blocks[std::size_t(layer)];
  const BlockActivations a = activations(m, layer, t);
  const bool is_fresh = transient_of_ == m && layer + 1 == layers_here();  // the forward has just been there
  if (limits_.recompute != Recompute::none && !is_fresh) recompute_block(m, layer, batch);
  transient_of_ = -1;
  const View dgated = rows(work_.dgated, t), dgate_up = rows(work_.dgate_up, t), dnormed = rows(work_.dnormed, own),
             dmiddle = rows(work_.dmiddle, own), dattended = rows(work_.dattended, t);
  const View dout = all_tokens(dx, t);
  device_.gemm(dw.down, transposed(dout), a.gated, Write::accumulate);
  device_.gemm(dgated, dout, w.down);
  device_.swiglu_backward(dgate_up, dgated, a.gate_up);
  device_.gemm(dw.gate_up, transposed(dgate_up), all_tokens(a.middle_normed, t), Write::accumulate);
  const View partial = partial_of(dnormed, t);
  device_.gemm(partial, dgate_up, w.gate_up);
  tp_.sum(dnormed, partial);
  device_.rms_norm_backward_add(dmiddle, dw.middle_norm, dnormed, dx, a.middle, w.middle_norm, a.middle_inv_rms);
  const View dattention = all_tokens(dmiddle, t);
  device_.gemm(dw.output, transposed(dattention), a.attended, Write::accumulate);
  device_.gemm(dattended, dattention, w.output);
  attention_backward(w, dw, a, batch);
  device_.rms_norm_backward_add(dx, dw.input_norm, dnormed, dmiddle, input(m, layer, t), w.input_norm, a.inv_rms);
}

// dhidden [C, H] → gradient of the residual stream behind the last block. The tail sees all tokens on every rank, so
// each has the whole gradient and takes its own rows.
void Transformer::tail_backward(int m, const DeviceBatch& batch, const ConstView& dhidden, View dx) {
  const std::int64_t t = batch.token_count(), c = batch.supervised_count();
  const View dlast = rows(work_.dlast, c), whole = tp_.cuts_tokens() ? rows(work_.whole, t) : dx;
  device_.rms_norm_backward(dlast, dparams_.norm, dhidden, rows(slot(m).last, c), params_.norm,
                            rows(slot(m).last_inv_rms, c));
  device_.zero(whole);
  device_.scatter_rows(whole, dlast, batch.supervised);
  if (tp_.cuts_tokens()) device_.cast(dx, tp_.own(whole));
}

View Transformer::backward(const DeviceBatch& batch, const ConstView& dhidden, int m, const BucketReady& ready) {
  check(limits_.trains, "backward of a model that does not train");
  const std::int64_t t = batch.token_count();
  const View dx = residual_gradient(t);
  std::size_t bucket = table_.buckets().size();
  const auto done = [&] {
    --bucket;
    if (ready) ready(bucket);
  };
  if (part_.has_head) {
    tail_backward(m, batch, dhidden, dx);
    while (bucket > bucket_of_layer(layers_here())) done();
  }
  for (int layer = layers_here() - 1; layer >= 0; --layer) {
    block_backward(m, layer, batch, dx);
    done();
  }
  if (part_.has_embedding) {
    device_.embedding_backward(dparams_.embedding, all_tokens(dx, t), batch.tokens,
                               std::int32_t(part_.vocabulary.first));
    done();
  }
  ++backwards_;
  return dx;
}

}  // namespace distill
