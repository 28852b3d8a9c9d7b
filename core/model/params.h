// The table of parameters: the single source for loading, saving, optimiser, ZeRO ranges, gradient norm and
// checkpoints. All parameters that a rank holds lie in one flat storage; values, gradients and optimiser state share
// its offsets.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/model/spec.h"
#include "core/model/vocabulary.h"
#include "core/tensor.h"

namespace distill {

enum class Init { normal, ones, zeros };  // normal: standard deviation ModelSpec::initializer_range

// The part of a parameter that a rank holds: rows × cols from (first_row, first_col) of the whole one.
struct Param {
  std::string name;  // as in the Hugging Face file
  std::int64_t rows = 1, cols = 0;
  bool is_matrix = false;  // false: a vector, shape [cols]
  bool decay = false;      // takes weight decay: matrices do, norms and biases do not
  Init init = Init::normal;
  std::int64_t whole_rows = 1, whole_cols = 0, first_row = 0, first_col = 0;
  int sharers = 1;          // neighbouring tensor-parallel ranks that hold the same part
  bool is_partial = false;  // a rank's gradient covers its heads or tokens only: the sharers' sum is the gradient
  bool is_copy = false;     // the first pipeline stage holds it too and is the one that counts (tied head)
  int index = 0;            // among the parameters of the whole model
  std::int64_t offset = 0;  // first element in the flat storage

  std::int64_t size() const { return rows * cols; }
  bool is_whole() const { return rows == whole_rows && cols == whole_cols; }
  // This parameter's part of a flat [1, n] storage.
  View in(const View& flat) const { return flat.col_slice(offset, size()).reshaped(rows, cols); }
};

// A range of the flat storage.
struct Range {
  std::int64_t begin = 0, size = 0;
  std::int64_t end() const { return begin + size; }
  bool operator==(const Range&) const = default;
};

// What a rank holds of a model: layers [first_layer, end_layer), the embedding on the first pipeline stage, norm and
// head on the last, of every matrix the part of its tensor-parallel rank.
struct ModelPart {
  int tp_size = 1, tp_rank = 0;
  int first_layer = 0, end_layer = 0;
  bool has_embedding = true, has_head = true;
  bool cuts_tokens = false;  // sequence parallel: norms see a part of the tokens
  VocabularyPart vocabulary;
};

// Layers of pipeline stage `stage` of `stages`: as even as can be, the first ones one shorter (they hold the
// embedding).
Range stage_layers(int layers, int stages, int stage);

class ParamTable {
 public:
  // bucket_parts: buckets can be cut into so many parts of equal, aligned size (data-parallel ranks).
  explicit ParamTable(int bucket_parts = 1) : bucket_parts_(bucket_parts) {}

  const std::vector<Param>& all() const { return params_; }
  // Elements of the flat storage, gaps for alignment included; gaps hold zeros.
  std::int64_t storage_size() const { return end_; }
  // Consecutive ranges that cover the storage: embedding, each layer, final norm, head. The backward completes them
  // from the last to the first.
  const std::vector<Range>& buckets() const { return buckets_; }
  // Number of parameters in the usual sense.
  std::int64_t count() const;
  // Null when there is none of that name.
  const Param* find(std::string_view name) const;

  // A vector or matrix at the next aligned offset.
  void add(Param param);
  // Matrices of equal cols (or vectors) without a gap between them, so that one product serves all.
  void add_fused(std::vector<Param> params);
  // Ends a bucket: what was added since the last one.
  void end_bucket();
  // Gives every parameter the index it has in the whole model's table.
  void number_as(const ParamTable& whole);

 private:
  int bucket_parts_;
  std::vector<Param> params_;
  std::vector<Range> buckets_;
  std::int64_t end_ = 0;
};

// All of a model on one rank.
ModelPart whole_model(const ModelSpec& spec);
// Ranks that hold the same key/value heads: more than 1 where there are fewer heads than ranks.
int kv_sharers(const ModelSpec& spec, int tp_size);

// The parameters of a whole model, named as transformers names them.
ParamTable param_table(const ModelSpec& spec);
// Those of a part. A part that the sizes do not allow is a failure: grids are checked before.
ParamTable param_table(const ModelSpec& spec, const ModelPart& part, int bucket_parts = 1);

}  // namespace distill
