#include "io/model_folder.h"

#include <sys/mman.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "core/error.h"
#include "io/convert.h"
#include "io/safetensors.h"
#include "io/strict_json.h"

namespace distill {

namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr std::size_t block_elements = (16 << 20) / sizeof(float);
constexpr const char* whole_file = "model.safetensors";
constexpr const char* index_file = "model.safetensors.index.json";
constexpr const char* head_name = "lm_head.weight";
constexpr const char* embedding_name = "model.embed_tokens.weight";

std::optional<DType> readable(const std::string& dtype) {
  if (dtype == "F32") return DType::f32;
  if (dtype == "BF16") return DType::bf16;
  if (dtype == "F16") return DType::f16;
  return std::nullopt;
}

std::vector<std::int64_t> shape_of(const Param& param) {
  return param.is_matrix ? std::vector{param.rows, param.cols} : std::vector{param.cols};
}

// Buffers that old versions of transformers saved and every version ignores.
bool is_ignored_buffer(std::string_view name) {
  return name.ends_with(".rotary_emb.inv_freq") || name.ends_with(".attn.bias") || name.ends_with(".masked_bias");
}

// Weights in a form or under a name that is not read here.
bool looks_like_weights(std::string_view name) {
  return name.ends_with(".safetensors") || name.ends_with(".gguf") || name.ends_with(".pth") ||
         name.starts_with("pytorch_model") || name.starts_with("tf_model") || name.starts_with("flax_model");
}

// Up to three names and how many more.
std::string some_of(const std::vector<std::string>& names) {
  std::string out;
  for (std::size_t i = 0; i < std::min<std::size_t>(names.size(), 3); ++i) out += (i == 0 ? "" : ", ") + names[i];
  return names.size() > 3 ? text(out, " and ", names.size() - 3, " more") : out;
}

// Tells the kernel that these bytes are needed soon.
void read_ahead(std::string_view bytes) {
  constexpr std::uintptr_t page = 4096;
  const auto begin = reinterpret_cast<std::uintptr_t>(bytes.data()) / page * page;
  const auto end = reinterpret_cast<std::uintptr_t>(bytes.data() + bytes.size());
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);
}

// file name → names of its tensors, out of an index whose every field is checked.
std::map<std::string, std::set<std::string>> read_index(const std::string& path) {
  const json index = read_strict_json(path);
  check_input(index.is_object() && index.contains("weight_map") && index["weight_map"].is_object(), path,
              ": has no weight_map (an object: tensor → file)");
  std::map<std::string, std::set<std::string>> shards;
  for (const auto& [tensor, file] : index["weight_map"].items()) {
    check_input(file.is_string(), path, ": weight_map: ", shown(tensor), ": found ", shown(file),
                ", expected a file name");
    const std::string name = file.get<std::string>();
    check_input(!name.empty() && name.find('/') == std::string::npos && name != "." && name != "..", path,
                ": weight_map: ", shown(tensor), ": found ", shown(file),
                ", expected the name of a file in this folder");
    shards[name].insert(tensor);
  }
  check_input(!shards.empty(), path, ": weight_map is empty");
  return shards;
}

}  // namespace

class ModelWeights::Files {
 public:
  Files(const std::string& folder, const ParamTable& table) : folder_(folder), table_(table) {
    const fs::path base(folder);
    if (fs::exists(base / whole_file))
      open_shard(base / whole_file);
    else
      open_index(base / index_file);
    check_against_table();
  }

  void load(const ParamTable& part, const WeightSink& sink) const {
    std::vector<float> block;
    for (const Param& param : part.all()) load(param, tensors_.at(param.name).tensor, block, sink);
  }

 private:
  struct Found {
    const SafeTensor& tensor;
    const std::string& file;
  };

  const SafetensorsFile& open_shard(const std::string& path) {
    shards_.push_back(std::make_unique<SafetensorsFile>(path));
    const SafetensorsFile& shard = *shards_.back();
    for (const auto& [name, tensor] : shard.tensors()) {
      const auto [other, is_new] = tensors_.emplace(name, Found{tensor, shard.path()});
      check_input(is_new, shard.path(), ": tensor ", name, " is also in ", other->second.file);
    }
    return shard;
  }

  void open_index(const std::string& path) {
    for (const auto& [file, names] : read_index(path)) {
      const fs::path shard_path = fs::path(folder_) / file;
      check_input(fs::exists(shard_path), path, ": names ", file, ", which is not in the folder");
      const SafetensorsFile& shard = open_shard(shard_path);
      for (const std::string& name : names)
        check_input(shard.tensors().contains(name), path, ": says that ", name, " is in ", file, ", but it is not");
      for (const auto& [name, _] : shard.tensors())
        check_input(names.contains(name) || is_ignored_buffer(name), path, ": does not name ", name, ", which is in ",
                    file);
    }
  }

  void check_against_table() const {
    std::vector<std::string> missing, unexpected;
    for (const Param& param : table_.all()) {
      const auto found = tensors_.find(param.name);
      if (found == tensors_.end())
        missing.push_back(param.name);
      else
        check_tensor(param, found->second);
    }
    for (const auto& [name, _] : tensors_)
      if (table_.find(name) == nullptr && !is_ignored_buffer(name) && name != head_name) unexpected.push_back(name);
    check_input(missing.empty(), folder_, ": the weights lack ", some_of(missing),
                ", which config.json calls for (the folder's files do not belong together?)");
    check_input(unexpected.empty(), folder_, ": the weights hold ", some_of(unexpected),
                ", which the model of config.json does not have (the folder's files do not belong together?)");
    check_tied_head();
  }

  static void check_tensor(const Param& param, const Found& found) {
    check_input(found.tensor.shape == shape_of(param), found.file, ": ", param.name, " has shape ",
                shape_text(found.tensor.shape), ", config.json calls for ", shape_text(shape_of(param)));
    check_input(readable(found.tensor.dtype).has_value(), found.file, ": ", param.name, " has dtype ",
                found.tensor.dtype, ", supported: F32, BF16, F16");
  }

  // A tied model may bring its head along, but then it must be the embedding.
  void check_tied_head() const {
    const auto head = tensors_.find(head_name);
    if (head == tensors_.end() || table_.find(head_name) != nullptr) return;
    const auto embedding = tensors_.find(embedding_name);
    check_input(embedding != tensors_.end() && head->second.tensor.bytes == embedding->second.tensor.bytes,
                head->second.file, ": ", head_name, " differs from ", embedding_name,
                ", but config.json ties the two (tie_word_embeddings: true)");
  }

  // Whole rows lie side by side; of cut ones the columns are picked, so that only what is wanted is read.
  static void load(const Param& param, const SafeTensor& tensor, std::vector<float>& block, const WeightSink& sink) {
    const DType type = *readable(tensor.dtype);
    const auto width = size_of(type), cols = std::size_t(param.cols), whole_cols = std::size_t(param.whole_cols);
    const bool has_whole_rows = param.cols == param.whole_cols;
    const auto run = has_whole_rows ? std::size_t(param.size()) : cols;  // neighbouring elements
    const std::size_t runs = has_whole_rows ? 1 : std::size_t(param.rows);
    const std::size_t first = std::size_t(param.first_row) * whole_cols + std::size_t(param.first_col);
    for (std::size_t r = 0; r < runs; ++r) {
      for (std::size_t done = 0; done < run; done += block_elements) {
        const std::size_t n = std::min(block_elements, run - done), at = (first + r * whole_cols + done) * width;
        if (has_whole_rows) read_ahead(tensor.bytes.substr(at, 2 * block_elements * width));
        block.resize(n);
        widen(block, type, tensor.bytes.data() + at);
        sink(param, std::int64_t(r * cols + done), block);
      }
    }
  }

  std::string folder_;
  const ParamTable& table_;
  std::vector<std::unique_ptr<SafetensorsFile>> shards_;
  std::map<std::string, Found, std::less<>> tensors_;
};

ModelWeights::ModelWeights(std::unique_ptr<Files> files) : files_(std::move(files)) {}
ModelWeights::~ModelWeights() = default;
ModelWeights::ModelWeights(ModelWeights&&) noexcept = default;
ModelWeights& ModelWeights::operator=(ModelWeights&&) noexcept = default;

std::optional<ModelWeights> ModelWeights::open(const std::string& folder, const ParamTable& table) {
  std::error_code error;
  const fs::path base(folder);
  check_input(fs::is_directory(base, error), folder, ": no such folder");
  if (fs::exists(base / whole_file, error) || fs::exists(base / index_file, error))
    return ModelWeights(std::make_unique<Files>(folder, table));
  for (const fs::directory_entry& entry : fs::directory_iterator(base)) {
    const std::string name = entry.path().filename().string();
    check_input(!looks_like_weights(name), folder, ": holds ", name, " but neither ", whole_file, " nor ", index_file,
                "; load it with transformers and save_pretrained() it to get safetensors");
  }
  return std::nullopt;
}

void ModelWeights::load(const ParamTable& part, const WeightSink& sink) const { files_->load(part, sink); }

bool load_weights(const std::string& folder, const ParamTable& whole, const ParamTable& part, const WeightSink& sink) {
  const auto weights = ModelWeights::open(folder, whole);
  if (weights) weights->load(part, sink);
  return weights.has_value();
}

}  // namespace distill
