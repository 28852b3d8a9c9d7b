#include "io/model_folder.h"

#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "io/safetensors.h"
#include "test/support/hostile.h"
#include "test/support/refusal.h"
#include "test/support/safetensors_bytes.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using namespace distill::test;
using nlohmann::json;

namespace {

ModelSpec parse(const json& config) { return parse_model_spec(config.dump(), "config.json"); }

const json small = {
    {"model_type", "qwen2"},  {"vocab_size", 5},          {"hidden_size", 4},         {"intermediate_size", 6},
    {"num_hidden_layers", 1}, {"num_attention_heads", 2}, {"num_key_value_heads", 1}, {"tie_word_embeddings", true}};

std::string refusal_of(const json& config) {
  return refusal("", [&] { parse(config); });
}

json with(json config, const json& changes) {
  config.update(changes);
  return config;
}

// A value that tells parameter and place.
float value_of(std::size_t param, std::int64_t element) { return float(param) + float(element) / 256; }

std::string bytes_of(float value, DType type) {
  if (type == DType::f32) return little_endian(std::bit_cast<std::uint32_t>(value), 4);
  return little_endian(type == DType::bf16 ? bf16(value).bits : f16(value).bits, 2);
}

// The tensors of a file: entries of its header and its data.
struct Shard {
  json header = json::object();
  std::string data;

  void add(const std::string& name, const std::vector<std::int64_t>& shape, const char* dtype,
           const std::string& bytes) {
    header[name] = {{"dtype", dtype}, {"shape", shape}, {"data_offsets", {data.size(), data.size() + bytes.size()}}};
    data += bytes;
  }
  void add(const ParamTable& table, std::size_t i, DType type = DType::f32) {
    const Param& param = table.all()[i];
    std::string bytes;
    for (std::int64_t e = 0; e < param.size(); ++e) bytes += bytes_of(value_of(i, e), type);
    const std::vector<std::int64_t> shape =
        param.is_matrix ? std::vector{param.rows, param.cols} : std::vector{param.cols};
    add(param.name, shape, type == DType::f32 ? "F32" : type == DType::bf16 ? "BF16" : "F16", bytes);
  }
  std::string bytes() const { return safetensors_bytes(header.dump(), data); }
};

Shard whole_model(const ParamTable& table, DType type = DType::f32) {
  Shard shard;
  for (std::size_t i = 0; i < table.all().size(); ++i) shard.add(table, i, type);
  return shard;
}

// Values by parameter; checks order and cut of the blocks.
std::vector<std::vector<float>> load(const std::string& folder, const ParamTable& table) {
  std::vector<std::vector<float>> values(table.all().size());
  std::size_t last = 0;
  const bool there =
      load_weights(folder, table, table, [&](const Param& param, std::int64_t first, std::span<const float> block) {
        const auto i = std::size_t(&param - table.all().data());
        CHECK(i >= last);
        CHECK(block.size_bytes() <= 16 << 20);
        REQUIRE(first == std::int64_t(values[i].size()));
        values[i].insert(values[i].end(), block.begin(), block.end());
        last = i;
      });
  CHECK(there);
  return values;
}

void check_values(const std::vector<std::vector<float>>& values, const ParamTable& table, DType type) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    REQUIRE(std::int64_t(values[i].size()) == table.all()[i].size());
    for (std::size_t e = 0; e < values[i].size(); ++e) {
      const float exact = value_of(i, std::int64_t(e));
      CHECK(values[i][e] == (type == DType::f32    ? exact
                             : type == DType::bf16 ? float(bf16(exact))
                                                   : float(f16(exact))));
    }
  }
}

// A folder with the small model's config.json.
struct SmallFolder : ScratchFolder {
  ParamTable table = param_table(parse(small));
  SmallFolder() { write("config.json", small.dump()); }

  std::string refuse() const {
    return refusal(path(), [&] { ModelWeights::open(path(), table); });
  }
  std::string refuse(const Shard& shard) const {
    write("model.safetensors", shard.bytes());
    return refuse();
  }
  std::string refuse_index(const std::string& index) const {
    write("model.safetensors.index.json", index);
    return refuse();
  }
  // Two shards and their index; returns weight_map.
  json write_shards(DType type = DType::f32) const {
    Shard one, two;
    json map;
    for (std::size_t i = 0; i < table.all().size(); ++i) {
      (i < 5 ? one : two).add(table, i, type);
      map[table.all()[i].name] = i < 5 ? "model-00001-of-00002.safetensors" : "model-00002-of-00002.safetensors";
    }
    write("model-00001-of-00002.safetensors", one.bytes());
    write("model-00002-of-00002.safetensors", two.bytes());
    return map;
  }
};

}  // namespace

TEST_CASE("configurations mean what they mean to transformers", "[model_folder]") {
  const json cases = json::parse(std::ifstream(DISTILL_SOURCE_DIR "/test/golden/model_configs.json"));
  REQUIRE(cases.size() > 20);
  for (const json& entry : cases) {
    INFO(entry["name"]);
    const json& e = entry["expected"];
    const ModelSpec spec = parse(entry["config"]);
    CHECK(spec.family == entry["config"]["model_type"]);
    CHECK(spec.vocabulary == e["vocabulary"]);
    CHECK(spec.hidden == e["hidden"]);
    CHECK(spec.feed_forward == e["feed_forward"]);
    CHECK(spec.layers == e["layers"]);
    CHECK(spec.q_heads == e["q_heads"]);
    CHECK(spec.kv_heads == e["kv_heads"]);
    CHECK(spec.head_dim == e["head_dim"]);
    CHECK(spec.norm_eps == e["norm_eps"].get<float>());
    CHECK(spec.tied_head == e["tied_head"]);
    CHECK(spec.rope_theta == e["rope_theta"]);
    CHECK(spec.sliding_window == e["sliding_window"]);
    CHECK(spec.max_positions == e["max_positions"]);
    CHECK(spec.initializer_range == e["initializer_range"]);
    REQUIRE(spec.rope_scaling.has_value() == !e["rope_scaling"].is_null());
    if (spec.rope_scaling)
      CHECK(json{spec.rope_scaling->factor, spec.rope_scaling->low_freq_factor, spec.rope_scaling->high_freq_factor,
                 spec.rope_scaling->original_max_positions} == e["rope_scaling"]);

    const ParamTable table = param_table(spec);
    CHECK(table.all().size() == e["parameters"]);
    for (const auto& [name, shape] : e["some_parameters"].items()) {
      INFO(name);
      const Param* param = table.find(name);
      REQUIRE(param != nullptr);
      CHECK(shape == (param->is_matrix ? json{param->rows, param->cols} : json{param->cols}));
    }
  }
}

TEST_CASE("what config.json may not say", "[model_folder]") {
  CHECK(refusal_of(json::array()) == "config.json: found [], expected an object");
  CHECK(refusal_of(json::object()) == "config.json: has no model_type; supported: qwen2, qwen3, llama, mistral");
  CHECK(refusal_of({{"model_type", "gemma"}}) ==
        "config.json: model_type: found \"gemma\", supported: qwen2, qwen3, llama, mistral");
  CHECK(refusal_of(with(small, {{"hidden_act", "gelu"}})) ==
        "config.json: hidden_act: found \"gelu\", supported: \"silu\"");
  CHECK(refusal_of({{"model_type", "llama"}, {"attention_bias", true}}) ==
        "config.json: attention_bias: found true, supported for llama: false");
  CHECK(refusal_of({{"model_type", "qwen3"}, {"attention_bias", true}}) ==
        "config.json: attention_bias: found true, supported for qwen3: false");
  CHECK(refusal_of({{"model_type", "llama"}, {"mlp_bias", true}}) ==
        "config.json: mlp_bias: found true, supported for llama: false");
  CHECK(refusal_of(with(small, {{"attention_dropout", 0.1}})) ==
        "config.json: attention_dropout: found 0.1, supported: 0");
  CHECK(refusal_of(with(small, {{"quantization_config", {{"bits", 4}}}})) ==
        "config.json: quantization_config: found {\"bits\":4}, quantised models are not supported: use the folder with "
        "the original weights");
  CHECK(refusal_of(with(small, {{"partial_rotary_factor", 0.5}})) ==
        "config.json: partial_rotary_factor: found 0.5, supported: 1");
}

TEST_CASE("sizes in config.json are checked", "[model_folder]") {
  CHECK(refusal_of(with(small, {{"hidden_size", 0}})) ==
        "config.json: hidden_size: found 0, expected an integer from 1 to 16777216");
  CHECK(refusal_of(with(small, {{"hidden_size", "4"}})) ==
        "config.json: hidden_size: found \"4\", expected an integer from 1 to 16777216");
  CHECK(refusal_of(with(small, {{"num_hidden_layers", 1e30}})) ==
        "config.json: num_hidden_layers: found 1e+30, expected an integer from 1 to 16384");
  CHECK(refusal_of(with(small, {{"vocab_size", 18446744073709551615u}})) ==
        "config.json: vocab_size: found 18446744073709551615, expected an integer from 1 to 1073741824");
  CHECK(refusal_of(with(small, {{"hidden_size", nullptr}})) ==
        "config.json: hidden_size: found null, expected an integer from 1 to 16777216");
  CHECK(refusal_of(with(small, {{"num_attention_heads", 3}, {"num_key_value_heads", 2}})) ==
        "config.json: num_attention_heads (3) is not a multiple of num_key_value_heads (2)");
  CHECK(refusal_of(with(small, {{"model_type", "llama"}, {"num_attention_heads", 3}})) ==
        "config.json: hidden_size (4) is not a multiple of num_attention_heads (3)");
  CHECK(refusal_of(with(small, {{"head_dim", 3}})) ==
        "config.json: head_dim is 3, expected an even number above 0: rotary embeddings turn pairs");
  CHECK(refusal_of(with(small, {{"num_attention_heads", 8}})) ==
        "config.json: head_dim is 0, expected an even number above 0: rotary embeddings turn pairs");
  CHECK(refusal_of(
            with(small, {{"num_hidden_layers", 16384}, {"hidden_size", 16777216}, {"intermediate_size", 16777216}})) ==
        "config.json: the sizes make a model of more than 1e+14 parameters");
  CHECK(refusal_of(with(small, {{"rms_norm_eps", -1}})) ==
        "config.json: rms_norm_eps: found -1, expected a number from 0 to 1");
  CHECK(refusal_of(with(small, {{"tie_word_embeddings", 1}})) ==
        "config.json: tie_word_embeddings: found 1, expected true or false");
  CHECK(refusal_of(with(small, {{"hidden_act", 1}})) == "config.json: hidden_act: found 1, expected a string");
}

TEST_CASE("rotary embeddings in config.json are checked", "[model_folder]") {
  const auto scaled = [](const json& scaling) { return with(small, {{"rope_scaling", scaling}}); };
  CHECK(refusal_of(scaled({{"type", "yarn"}, {"factor", 4.0}})) ==
        "config.json: rope_scaling: rope_type: found \"yarn\", supported: \"default\", \"llama3\"");
  CHECK(refusal_of(with(small, {{"rope_parameters", {{"rope_type", "linear"}}}})) ==
        "config.json: rope_parameters: rope_type: found \"linear\", supported: \"default\", \"llama3\"");
  CHECK(refusal_of(scaled("llama3")) == "config.json: rope_scaling: found \"llama3\", expected an object");
  CHECK(refusal_of(scaled({{"rope_type", "llama3"}})) == "config.json: rope_scaling: has no factor");
  CHECK(refusal_of(scaled({{"rope_type", "llama3"}, {"factor", 2}, {"low_freq_factor", 4}, {"high_freq_factor", 4}})) ==
        "config.json: rope_scaling: high_freq_factor: found 4.0, expected more than low_freq_factor (4)");
  CHECK(refusal_of(with(small, {{"rope_parameters", {{"partial_rotary_factor", 0.25}}}})) ==
        "config.json: rope_parameters: partial_rotary_factor: found 0.25, supported: 1");
  CHECK(refusal_of(with(small, {{"rope_theta", "1e6"}})) ==
        "config.json: rope_theta: found \"1e6\", expected a number from 0.001 to 1e+15");
}

TEST_CASE("sliding windows in config.json are checked", "[model_folder]") {
  const json sliding = with(small, {{"use_sliding_window", true}, {"sliding_window", 3}, {"num_hidden_layers", 4}});
  CHECK(refusal_of(with(sliding, {{"max_window_layers", 3}})) ==
        "config.json: 1 of 4 layers have a sliding window (use_sliding_window, max_window_layers, layer_types); "
        "supported: all layers or none");
  CHECK(refusal_of(with(sliding, {{"layer_types", {"full_attention"}}})) ==
        "config.json: layer_types: found [\"full_attention\"], expected a list of num_hidden_layers (4) names");
  CHECK(refusal_of(with(small, {{"layer_types", {"linear_attention"}}})) ==
        "config.json: layer_types: found \"linear_attention\", supported: \"full_attention\", \"sliding_attention\"");
  CHECK(refusal_of(with(small, {{"layer_types", {"sliding_attention"}}})) ==
        "config.json: layer_types: found [\"sliding_attention\"], but use_sliding_window and sliding_window give no "
        "window");
  CHECK(refusal_of(with(sliding, {{"max_window_layers", -1}})) ==
        "config.json: max_window_layers: found -1, expected a non-negative integer");
}

TEST_CASE("damaged configurations give an error or a specification", "[model_folder]") {
  const std::string whole =
      with(small,
           {{"rope_scaling", {{"rope_type", "llama3"}, {"factor", 8}, {"low_freq_factor", 1}, {"high_freq_factor", 4}}},
            {"layer_types", {"full_attention"}},
            {"sliding_window", 7},
            {"max_window_layers", 3}})
          .dump();
  std::mt19937 random(3);
  int refused = 0;
  for (int round = 0; round < 20000; ++round) {
    try {
      const ModelSpec spec = parse_model_spec(damaged(whole, random), "config.json");
      CHECK(param_table(spec).count() > 0);
    } catch (const Error& error) {
      ++refused;
      CHECK(error.code() == ExitCode::bad_input);
    }
  }
  CHECK(refused > 10000);
}

TEST_CASE("folders that are none", "[model_folder]") {
  const ScratchFolder folder;
  const auto refuse = [&](const std::string& path) { return refusal(folder.path(), [&] { read_model_spec(path); }); };
  CHECK(refusal(folder.path(), [&] { ModelWeights::open(folder.path("nowhere"), SmallFolder().table); }) ==
        "nowhere: no such folder");
  CHECK(refuse(folder.path("Qwen/Qwen2.5-0.5B")) ==
        "Qwen/Qwen2.5-0.5B: no such folder (models are read from local folders: download the model first)");
  std::filesystem::create_directory(folder.path("empty"));
  CHECK(refuse(folder.path("empty")) == "empty: has no config.json: not a Hugging Face model folder");
  folder.write("empty/config.json", "{");
  CHECK(refuse(folder.path("empty")) ==
        "empty/config.json: not valid JSON: line 1, column 2: syntax error while parsing object key - unexpected end "
        "of input; expected string literal");
}

TEST_CASE("one file and shards, in every dtype", "[model_folder]") {
  const DType type = GENERATE(DType::f32, DType::bf16, DType::f16);
  const SmallFolder folder;
  SECTION("one file") { folder.write("model.safetensors", whole_model(folder.table, type).bytes()); }
  SECTION("shards") {
    folder.write("model.safetensors.index.json",
                 json{{"metadata", {{"total_size", 1}}}, {"weight_map", folder.write_shards(type)}}.dump());
  }
  check_values(load(folder.path(), folder.table), folder.table, type);
}

TEST_CASE("large tensors come in blocks", "[model_folder]") {
  const ScratchFolder folder;
  const ModelSpec spec = parse(with(small, {{"vocab_size", 1200}, {"hidden_size", 4096}}));
  ParamTable table;
  table.add({.name = "x", .rows = spec.vocabulary, .cols = spec.hidden, .is_matrix = true});
  Shard shard;
  shard.add(table, 0, DType::bf16);
  folder.write("model.safetensors", shard.bytes());
  const auto values = load(folder.path(), table);
  REQUIRE(values[0].size() == 1200u * 4096u);
  std::size_t wrong = 0;
  for (std::size_t e = 0; e < values[0].size(); ++e) wrong += values[0][e] != float(bf16(value_of(0, std::int64_t(e))));
  CHECK(wrong == 0);
}

TEST_CASE("a folder without weights says so", "[model_folder]") {
  const SmallFolder folder;
  CHECK_FALSE(load_weights(folder.path(), folder.table, folder.table, [](const Param&, std::int64_t, std::span<const float>) {}));
  folder.write("training_args.bin", "");
  CHECK_FALSE(ModelWeights::open(folder.path(), folder.table).has_value());
}

TEST_CASE("weights in another form must be converted", "[model_folder]") {
  const std::string name = GENERATE("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth",
                                    "x.gguf", "model-00001-of-00002.safetensors");
  const SmallFolder folder;
  folder.write(name, "");
  CHECK(folder.refuse() == ": holds " + name +
                               " but neither model.safetensors nor model.safetensors.index.json; load it with "
                               "transformers and save_pretrained() it to get safetensors");
}

TEST_CASE("weights must be those of config.json", "[model_folder]") {
  const SmallFolder folder;
  const ParamTable& table = folder.table;
  SECTION("missing") {
    Shard shard;
    for (std::size_t i = 4; i < table.all().size(); ++i) shard.add(table, i);
    CHECK(folder.refuse(shard) ==
          ": the weights lack model.embed_tokens.weight, model.layers.0.input_layernorm.weight, "
          "model.layers.0.self_attn.q_proj.weight and 1 more, which config.json calls for (the folder's files do not "
          "belong together?)");
  }
  SECTION("unexpected") {
    Shard shard = whole_model(table);
    shard.add("score.weight", {1}, "F32", "1234");
    CHECK(folder.refuse(shard) ==
          ": the weights hold score.weight, which the model of config.json does not have (the folder's files do not "
          "belong together?)");
  }
  SECTION("shape") {
    Shard shard = whole_model(table);
    shard.header["model.norm.weight"]["shape"] = {2, 2};
    CHECK(folder.refuse(shard) == "model.safetensors: model.norm.weight has shape [2, 2], config.json calls for [4]");
  }
  SECTION("dtype") {
    Shard shard = whole_model(table);
    shard.header["model.norm.weight"]["dtype"] = "I32";
    CHECK(folder.refuse(shard) == "model.safetensors: model.norm.weight has dtype I32, supported: F32, BF16, F16");
  }
  SECTION("old buffers are ignored") {
    Shard shard = whole_model(table);
    shard.add("model.layers.0.self_attn.rotary_emb.inv_freq", {1}, "F32", "1234");
    CHECK(folder.refuse(shard) == "no error");
  }
  SECTION("a tied head that is the embedding is ignored, another one is an error") {
    Shard shard = whole_model(table);
    std::string embedding = shard.data.substr(0, 5 * 4 * 4);
    shard.add("lm_head.weight", {5, 4}, "F32", embedding);
    CHECK(folder.refuse(shard) == "no error");
    shard.data.back() = 'x';
    CHECK(folder.refuse(shard) ==
          "model.safetensors: lm_head.weight differs from model.embed_tokens.weight, but config.json ties the two "
          "(tie_word_embeddings: true)");
  }
}

TEST_CASE("the index must be that of the shards", "[model_folder]") {
  const SmallFolder folder;
  json map = folder.write_shards();
  const std::string norm = "model.norm.weight", index = "model.safetensors.index.json";
  CHECK(folder.refuse_index("{}") == index + ": has no weight_map (an object: tensor → file)");
  CHECK(folder.refuse_index(R"({"weight_map":{}})") == index + ": weight_map is empty");
  CHECK(folder.refuse_index(R"({"weight_map":{"x":1}})") ==
        index + ": weight_map: \"x\": found 1, expected a file name");
  CHECK(folder.refuse_index(R"({"weight_map":{"x":"../x"}})") ==
        index + ": weight_map: \"x\": found \"../x\", expected the name of a file in this folder");
  CHECK(folder.refuse_index(R"({"weight_map":{"x":"a","x":"b"}})") ==
        index + ": key \"x\" appears twice in one object");
  CHECK(folder.refuse_index(json{{"weight_map", with(map, {{norm, "absent.safetensors"}})}}.dump()) ==
        index + ": names absent.safetensors, which is not in the folder");
  CHECK(folder.refuse_index(json{{"weight_map", with(map, {{norm, "model-00001-of-00002.safetensors"}})}}.dump()) ==
        index + ": says that model.norm.weight is in model-00001-of-00002.safetensors, but it is not");
  json without_norm = map;
  without_norm.erase(norm);
  CHECK(folder.refuse_index(json{{"weight_map", without_norm}}.dump()) ==
        index + ": does not name model.norm.weight, which is in model-00002-of-00002.safetensors");
  Shard two;
  for (const std::size_t i : {4, 5}) two.add(folder.table, i);
  folder.write("model-00002-of-00002.safetensors", two.bytes());
  CHECK(folder.refuse_index(json{{"weight_map", map}}.dump()) == "model-00002-of-00002.safetensors: tensor " +
                                                                     folder.table.all()[4].name +
                                                                     " is also in model-00001-of-00002.safetensors");
  std::filesystem::remove(folder.path("model-00002-of-00002.safetensors"));
  CHECK(folder.refuse_index(json{{"weight_map", map}}.dump()) ==
        index + ": names model-00002-of-00002.safetensors, which is not in the folder");
}
