#include "io/export.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <vector>

#include "core/error.h"
#include "io/convert.h"
#include "io/durable_file.h"
#include "io/mapped_file.h"
#include "io/safetensors.h"
#include "io/strict_json.h"

namespace distill {

namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr std::int64_t block_elements = (16 << 20) / sizeof(float);
constexpr std::array tokenizer_files = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "merges.txt",     "chat_template.jinja",   "added_tokens.json",       "tokenizer.model"};
constexpr const char* generation_file = "generation_config.json";

std::string dtype_in_config(DType type) {
  switch (type) {
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::f16:
      return "float16";
    default:
      fail("export: ", name_of(type), " is not written");
  }
}

// The class that transformers builds.
std::string architecture(const std::string& model_type) {
  static const std::map<std::string, std::string> classes = {{"qwen2", "Qwen2ForCausalLM"},
                                                             {"qwen3", "Qwen3ForCausalLM"},
                                                             {"llama", "LlamaForCausalLM"},
                                                             {"mistral", "MistralForCausalLM"}};
  return classes.at(model_type);
}

void write_json(const fs::path& path, const json& value) { write_durably(path, value.dump(2) + "\n"); }

void copy_durably(const fs::path& from, const fs::path& to) { write_durably(to, MappedFile(from).bytes()); }

// Files written by transformers 5 have dtype, older ones torch_dtype; a hand-written one without either gets the name
// that both read.
json exported_config(const std::string& folder, DType dtype) {
  json config = read_strict_json(fs::path(folder) / "config.json");
  if (!config.contains("architectures")) config["architectures"] = {architecture(config.at("model_type"))};
  const bool is_new = config.contains("dtype");
  if (is_new) config["dtype"] = dtype_in_config(dtype);
  if (!is_new || config.contains("torch_dtype")) config["torch_dtype"] = dtype_in_config(dtype);
  return config;
}

json generation_config(const json& config) {
  json out = {{"_from_model_config", true}};
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"})
    if (config.contains(key) && !config[key].is_null()) out[key] = config[key];
  return out;
}

using Shard = std::vector<const Param*>;

// In the order of the table; a parameter that is larger than a shard may be gets one of its own.
std::vector<Shard> cut(const ParamTable& table, std::int64_t width, std::int64_t max_shard_bytes) {
  std::vector<Shard> shards;
  std::int64_t filled = 0;
  for (const Param& param : table.all()) {
    const std::int64_t bytes = param.size() * width;
    if (shards.empty() || filled + bytes > max_shard_bytes) {
      shards.emplace_back();
      filled = 0;
    }
    shards.back().push_back(&param);
    filled += bytes;
  }
  return shards;
}

std::string shard_name(std::size_t i, std::size_t n) {
  if (n == 1) return "model.safetensors";
  std::array<char, 64> name{};
  std::snprintf(name.data(), name.size(), "model-%05zu-of-%05zu.safetensors", i + 1, n);
  return name.data();
}

void write_shard(const fs::path& path, const Shard& shard, DType dtype, const WeightReader& reader) {
  std::vector<SafetensorsWriter::Entry> entries;
  for (const Param* p : shard)
    entries.push_back({p->name, dtype, p->is_matrix ? std::vector{p->rows, p->cols} : std::vector{p->cols}});
  SafetensorsWriter writer(path, entries);
  std::vector<float> values;
  std::vector<std::uint32_t> narrowed;  // raw memory, aligned for every dtype
  for (const Param* param : shard) {
    for (std::int64_t first = 0; first < param->size(); first += block_elements) {
      const auto n = std::size_t(std::min(block_elements, param->size() - first));
      values.resize(n);
      narrowed.resize(n);
      reader(*param, first, values);
      narrow(narrowed.data(), dtype, values);
      writer.write(std::as_bytes(std::span(narrowed)).first(n * size_of(dtype)));
    }
  }
  writer.commit();
}

void write_weights(const fs::path& folder, const ParamTable& table, DType dtype, const WeightReader& reader,
                   std::int64_t max_shard_bytes) {
  const std::vector<Shard> shards = cut(table, std::int64_t(size_of(dtype)), max_shard_bytes);
  json map = json::object();
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const std::string name = shard_name(i, shards.size());
    write_shard(folder / name, shards[i], dtype, reader);
    for (const Param* param : shards[i]) map[param->name] = name;
  }
  const std::int64_t count = table.count();
  const json metadata = {{"total_parameters", count}, {"total_size", count * std::int64_t(size_of(dtype))}};
  if (shards.size() > 1)
    write_json(folder / "model.safetensors.index.json", {{"metadata", metadata}, {"weight_map", map}});
}

}  // namespace

void export_model(const std::string& folder, const ExportSource& source, const ParamTable& table, DType dtype,
                  const WeightReader& reader, std::int64_t max_shard_bytes) {
  DurableFolder out(folder);
  const fs::path to(out.partial());
  const json config = exported_config(source.model, dtype);
  write_json(to / "config.json", config);
  for (const char* name : tokenizer_files)
    if (fs::exists(fs::path(source.tokenizer) / name)) copy_durably(fs::path(source.tokenizer) / name, to / name);
  const fs::path generation = fs::path(source.model) / generation_file;
  if (fs::exists(generation))
    copy_durably(generation, to / generation_file);
  else
    write_json(to / generation_file, generation_config(config));
  write_weights(to, table, dtype, reader, max_shard_bytes);
  out.commit();
}

}  // namespace distill
