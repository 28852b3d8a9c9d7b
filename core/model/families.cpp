// Where the families' parameters and their Hugging Face names stand, and how each is cut over tensor-parallel ranks.
#include <algorithm>

#include "core/model/params.h"

namespace distill {

namespace {

Param matrix(std::string name, std::int64_t rows, std::int64_t cols) {
  return {.name = std::move(name), .rows = rows, .cols = cols, .is_matrix = true, .decay = true, .init = Init::normal};
}
Param norm(std::string name, std::int64_t cols) { return {.name = std::move(name), .cols = cols, .init = Init::ones}; }
Param bias(std::string name, std::int64_t cols) { return {.name = std::move(name), .cols = cols, .init = Init::zeros}; }

// Part `part` of `parts` equal ones of the rows (a vector: of the columns).
Param cut_outputs(Param whole, int parts, int part) {
  std::int64_t& n = whole.is_matrix ? whole.rows : whole.cols;
  check(n % parts == 0, whole.name, ": ", n, " outputs cannot be cut into ", parts);
  whole.whole_rows = whole.rows;
  whole.whole_cols = whole.cols;
  n /= parts;
  (whole.is_matrix ? whole.first_row : whole.first_col) = n * part;
  return whole;
}
// The same of the columns of a matrix.
Param cut_inputs(Param whole, int parts, int part) {
  check(whole.cols % parts == 0, whole.name, ": ", whole.cols, " inputs cannot be cut into ", parts);
  whole.whole_rows = whole.rows;
  whole.whole_cols = whole.cols;
  whole.cols /= parts;
  whole.first_col = whole.cols * part;
  return whole;
}

// The table of one rank, from top to bottom.
class PartTable {
 public:
  PartTable(const ModelSpec& spec, const ModelPart& part, int bucket_parts)
      : s_(spec), part_(part), table_(bucket_parts) {}

  ParamTable build() && {
    if (part_.has_embedding) add_bucket(vocabulary_rows("model.embed_tokens.weight"));
    for (int layer = part_.first_layer; layer < part_.end_layer; ++layer) {
      add_block(text("model.layers.", layer, "."));
      table_.end_bucket();
    }
    if (part_.has_head) {
      add_bucket(shared(norm("model.norm.weight", s_.hidden)));
      if (!s_.tied_head) add_bucket(vocabulary_rows("lm_head.weight"));
      if (s_.tied_head && !part_.has_embedding) {
        Param copy = vocabulary_rows("model.embed_tokens.weight");
        copy.is_copy = true;
        add_bucket(std::move(copy));
      }
    }
    return std::move(table_);
  }

 private:
  void add_bucket(Param param) {
    table_.add(std::move(param));
    table_.end_bucket();
  }

  void add_block(const std::string& block) {
    const std::string attention = block + "self_attn.", mlp = block + "mlp.";
    table_.add(token_norm(block + "input_layernorm.weight"));
    table_.add_fused({cut(matrix(attention + "q_proj.weight", s_.q_cols(), s_.hidden)),
                      cut_kv(matrix(attention + "k_proj.weight", s_.kv_cols(), s_.hidden)),
                      cut_kv(matrix(attention + "v_proj.weight", s_.kv_cols(), s_.hidden))});
    if (s_.qkv_bias)
      table_.add_fused({cut(bias(attention + "q_proj.bias", s_.q_cols())),
                        cut_kv(bias(attention + "k_proj.bias", s_.kv_cols())),
                        cut_kv(bias(attention + "v_proj.bias", s_.kv_cols()))});
    if (s_.qk_norm) {
      table_.add(head_norm(attention + "q_norm.weight"));
      table_.add(head_norm(attention + "k_norm.weight"));
    }
    table_.add(cut_inputs(matrix(attention + "o_proj.weight", s_.hidden, s_.q_cols()), part_.tp_size, part_.tp_rank));
    table_.add(token_norm(block + "post_attention_layernorm.weight"));
    table_.add_fused({cut(matrix(mlp + "gate_proj.weight", s_.feed_forward, s_.hidden)),
                      cut(matrix(mlp + "up_proj.weight", s_.feed_forward, s_.hidden))});
    table_.add(cut_inputs(matrix(mlp + "down_proj.weight", s_.hidden, s_.feed_forward), part_.tp_size, part_.tp_rank));
  }

  Param vocabulary_rows(const std::string& name) const {
    Param param = matrix(name, part_.vocabulary.rows, s_.hidden);
    param.whole_rows = s_.vocabulary;
    param.whole_cols = s_.hidden;
    param.first_row = part_.vocabulary.first;
    return param;
  }
  Param cut(Param whole) const { return cut_outputs(std::move(whole), part_.tp_size, part_.tp_rank); }
  // Fewer key/value heads than ranks: neighbours hold the same head, each for its own query heads.
  Param cut_kv(Param whole) const {
    const int sharers = kv_sharers(s_, part_.tp_size);
    Param param = cut_outputs(std::move(whole), part_.tp_size / sharers, part_.tp_rank / sharers);
    param.sharers = sharers;
    param.is_partial = sharers > 1;
    return param;
  }
  // Held by every tensor-parallel rank.
  Param shared(Param param) const {
    param.sharers = part_.tp_size;
    return param;
  }
  Param token_norm(const std::string& name) const {
    Param param = shared(norm(name, s_.hidden));
    param.is_partial = part_.tp_size > 1 && part_.cuts_tokens;
    return param;
  }
  Param head_norm(const std::string& name) const {
    Param param = shared(norm(name, s_.head_dim));
    param.is_partial = part_.tp_size > 1;
    return param;
  }

  const ModelSpec& s_;
  const ModelPart& part_;
  ParamTable table_;
};

}  // namespace

int kv_sharers(const ModelSpec& spec, int tp_size) { return std::max(1, tp_size / spec.kv_heads); }

ModelPart whole_model(const ModelSpec& s) {
  return {.end_layer = s.layers, .vocabulary = {.first = 0, .rows = s.vocabulary, .columns = s.vocabulary}};
}

ParamTable param_table(const ModelSpec& s) {
  ParamTable table = PartTable(s, whole_model(s), 1).build();
  table.number_as(table);
  return table;
}

ParamTable param_table(const ModelSpec& s, const ModelPart& part, int bucket_parts) {
  ParamTable table = PartTable(s, part, bucket_parts).build();
  table.number_as(param_table(s));
  return table;
}

}  // namespace distill
