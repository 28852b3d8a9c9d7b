// Hugging Face model folders: config.json to a ModelSpec, weights out of safetensors files. README.md says which fields
// and values are read.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/model/params.h"

namespace distill {

// From <folder>/config.json. What changes the maths and is not supported is an input error that names file, field,
// value and what is supported.
ModelSpec read_model_spec(const std::string& folder);
// The same from the text of a config.json; `path` is what messages call it.
ModelSpec parse_model_spec(std::string_view json, const std::string& path);

// Receives values [first_element, first_element + values.size()) of the part of a parameter that a table holds,
// row-major. Parameters come in the order of the table, their blocks in ascending order; a block is at most 16 MB, or one
// row, and only valid during the call.
using WeightSink = std::function<void(const Param& param, std::int64_t first_element, std::span<const float> values)>;

// The weights of a folder, checked against the table of the whole model: every parameter is there with its shape and a
// dtype that can be read, and nothing else but what transformers ignores too.
class ModelWeights {
 public:
  // Nothing when the folder holds no weights at all: the model starts from random ones. The table must outlive this.
  static std::optional<ModelWeights> open(const std::string& folder, const ParamTable& table);
  ~ModelWeights();
  ModelWeights(ModelWeights&&) noexcept;
  ModelWeights& operator=(ModelWeights&&) noexcept;

  // What `part` holds of the model.
  void load(const ParamTable& part, const WeightSink& sink) const;

 private:
  class Files;
  explicit ModelWeights(std::unique_ptr<Files> files);
  std::unique_ptr<Files> files_;
};

// What `part` holds of the model whose table is `whole`. False when the folder holds no weights.
bool load_weights(const std::string& folder, const ParamTable& whole, const ParamTable& part, const WeightSink& sink);

}  // namespace distill
