// The table of parameters: the single source for loading, saving, optimiser, gradient norm and checkpoints. All
// parameters of a model lie in one flat storage; values, gradients and optimiser state share the same offsets.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/model/spec.h"
#include "core/tensor.h"

namespace distill {

enum class Init { normal, ones, zeros };  // normal: standard deviation ModelSpec::initializer_range

struct Param {
  std::string name;  // as in the Hugging Face file
  std::int64_t rows = 1, cols = 0;
  bool is_matrix = false;  // false: a vector, shape [cols]
  bool decay = false;      // takes weight decay: matrices do, norms and biases do not
  Init init = Init::normal;
  std::int64_t offset = 0;  // first element in the flat storage

  std::int64_t size() const { return rows * cols; }
  // This parameter's part of a flat [1, n] storage.
  View in(const View& flat) const { return flat.col_slice(offset, size()).reshaped(rows, cols); }
};

using ParamId = int;

class ParamTable {
 public:
  const std::vector<Param>& all() const { return params_; }
  const Param& operator[](ParamId id) const { return params_[std::size_t(id)]; }
  // Elements of the flat storage, gaps for alignment included; gaps hold zeros.
  std::int64_t storage_size() const { return end_; }
  // Number of parameters in the usual sense.
  std::int64_t count() const;
  // Null when there is none of that name.
  const Param* find(std::string_view name) const;

  // A vector or matrix at the next aligned offset.
  ParamId add(Param param);
  // Matrices of equal cols (or vectors) without a gap between them, so that one product serves all.
  std::vector<ParamId> add_fused(std::vector<Param> params);

 private:
  std::vector<Param> params_;
  std::int64_t end_ = 0;
};

// The parameters of a whole model, named as transformers names them.
ParamTable param_table(const ModelSpec& spec);

}  // namespace distill
