// Where the families' parameters and their Hugging Face names stand.
#include "core/model/params.h"

namespace distill {

namespace {

Param matrix(std::string name, std::int64_t rows, std::int64_t cols) {
  return {.name = std::move(name), .rows = rows, .cols = cols, .is_matrix = true, .decay = true, .init = Init::normal};
}
Param norm(std::string name, std::int64_t cols) { return {.name = std::move(name), .cols = cols, .init = Init::ones}; }
Param bias(std::string name, std::int64_t cols) { return {.name = std::move(name), .cols = cols, .init = Init::zeros}; }

void add_block(ParamTable& table, const ModelSpec& s, const std::string& block) {
  const std::string attention = block + "self_attn.", mlp = block + "mlp.";
  table.add(norm(block + "input_layernorm.weight", s.hidden));
  table.add_fused({matrix(attention + "q_proj.weight", s.q_cols(), s.hidden),
                   matrix(attention + "k_proj.weight", s.kv_cols(), s.hidden),
                   matrix(attention + "v_proj.weight", s.kv_cols(), s.hidden)});
  if (s.qkv_bias)
    table.add_fused({bias(attention + "q_proj.bias", s.q_cols()), bias(attention + "k_proj.bias", s.kv_cols()),
                     bias(attention + "v_proj.bias", s.kv_cols())});
  if (s.qk_norm) {
    table.add(norm(attention + "q_norm.weight", s.head_dim));
    table.add(norm(attention + "k_norm.weight", s.head_dim));
  }
  table.add(matrix(attention + "o_proj.weight", s.hidden, s.q_cols()));
  table.add(norm(block + "post_attention_layernorm.weight", s.hidden));
  table.add_fused({matrix(mlp + "gate_proj.weight", s.feed_forward, s.hidden),
                   matrix(mlp + "up_proj.weight", s.feed_forward, s.hidden)});
  table.add(matrix(mlp + "down_proj.weight", s.hidden, s.feed_forward));
}

}  // namespace

ParamTable param_table(const ModelSpec& s) {
  ParamTable table;
  table.add(matrix("model.embed_tokens.weight", s.vocabulary, s.hidden));
  for (int layer = 0; layer < s.layers; ++layer) add_block(table, s, text("model.layers.", layer, "."));
  table.add(norm("model.norm.weight", s.hidden));
  if (!s.tied_head) table.add(matrix("lm_head.weight", s.vocabulary, s.hidden));
  return table;
}

}  // namespace distill
