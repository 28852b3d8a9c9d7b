// A model folder: a config.json where the input begins with a brace, else a model.safetensors; the other file is a good
// one of a tiny model.
#include "io/safetensors.h"

#include "io/model_folder.h"
#include "test/fuzz/fuzz.h"

using namespace distill;
using namespace distill::test;

namespace {

ModelSpec tiny_model() {
  return parse_model_spec(R"({"model_type": "qwen2", "vocab_size": 3, "hidden_size": 2, "intermediate_size": 1,
    "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": true})",
                          "config.json");
}

void read_index_or_spec(const FuzzFolder& folder, std::string_view content) {
  is_accepted([&] {
    const ModelSpec spec = parse_model_spec(content, "config.json");
    claim(spec.layers > 0 && spec.hidden > 0 && spec.q_heads % spec.kv_heads == 0, "a model has sizes that fit");
  });
  const ParamTable table = param_table(tiny_model());
  std::filesystem::remove(folder.path() + "/model.safetensors");
  folder.write("model.safetensors.index.json", content);
  is_accepted([&] { ModelWeights::open(folder.path(), table); });
}

void read_weights(const FuzzFolder& folder, std::string_view content) {
  const std::string path = folder.write("model.safetensors", content);
  is_accepted([&] {
    const SafetensorsFile file(path);
    for (const auto& [_, tensor] : file.tensors())
      claim(content.find(tensor.bytes) != std::string_view::npos, "a tensor's bytes are bytes of the file");
  });
  const ParamTable table = param_table(tiny_model());
  is_accepted([&] {
    const auto weights = ModelWeights::open(folder.path(), table);
    claim(weights.has_value(), "there are weights");
    std::size_t values = 0;
    weights->load(table, [&](const Param&, std::int64_t, std::span<const float> block) { values += block.size(); });
    claim(values == std::size_t(table.count()), "every parameter is loaded");
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  static const FuzzFolder folder;
  const std::string_view content = text_of(bytes, size);
  if (content.starts_with('{'))
    read_index_or_spec(folder, content);
  else
    read_weights(folder, content);
  return 0;
}
