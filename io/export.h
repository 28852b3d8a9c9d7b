// A model as a Hugging Face folder that transformers loads without complaint: complete or absent.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "core/model/params.h"

namespace distill {

// Fills `values` with elements [first_element, first_element + values.size()) of a parameter, row-major.
using WeightReader = std::function<void(const Param& param, std::int64_t first_element, std::span<float> values)>;

struct ExportSource {
  std::string model;      // folder with config.json, of which every field but the dtype is kept
  std::string tokenizer;  // folder with the tokenizer files
};

// Writes config.json, model.safetensors (or shards of at most max_shard_bytes and their index), the tokenizer files and
// generation_config.json to `folder`, replacing an older one.
void export_model(const std::string& folder, const ExportSource& source, const ParamTable& table, DType dtype,
                  const WeightReader& reader, std::int64_t max_shard_bytes = 5'000'000'000);

}  // namespace distill
