#include "io/export.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "io/model_folder.h"
#include "test/support/limit.h"
#include "test/support/refusal.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using namespace distill::test;
using nlohmann::json;
namespace fs = std::filesystem;

namespace {

std::string read(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

float value_of(const Param& param, std::int64_t element) { return float(param.offset % 97) + float(element) / 64; }

void fill(const Param& param, std::int64_t first, std::span<float> values) {
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = value_of(param, first + std::int64_t(i));
}

std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}
using Names = std::vector<std::string>;

const json small = {{"model_type", "llama"},  {"vocab_size", 5},
                    {"hidden_size", 4},       {"intermediate_size", 6},
                    {"num_hidden_layers", 2}, {"num_attention_heads", 2},
                    {"eos_token_id", {2, 3}}, {"pad_token_id", nullptr},
                    {"bos_token_id", 1},      {"something_else", {{"kept", true}}}};

// A source folder with tokenizer files.
struct Source : ScratchFolder {
  ParamTable table;
  explicit Source(const json& config = small) {
    fs::create_directory(path("in"));
    write("in/config.json", config.dump());
    write("in/tokenizer.json", "{\"a\": 1}");
    write("in/chat_template.jinja", "{{ x }}");
    write("in/optimizer.pt", "not for export");
    table = param_table(read_model_spec(path("in")));
  }
  void run(DType dtype = DType::bf16, std::int64_t max_shard_bytes = 1 << 30) const {
    export_model(path("out"), {.model = path("in"), .tokenizer = path("in")}, table, dtype, fill, max_shard_bytes);
  }
  json config() const { return json::parse(read(path("out/config.json"))); }
};

void check_weights(const Source& source, DType dtype) {
  std::map<std::string, std::int64_t> seen;
  REQUIRE(load_weights(source.path("out"), source.table, source.table,
                       [&](const Param& param, std::int64_t first, std::span<const float> values) {
                         for (std::size_t i = 0; i < values.size(); ++i) {
                           const float exact = value_of(param, first + std::int64_t(i));
                           CHECK(values[i] == (dtype == DType::f32    ? exact
                                               : dtype == DType::bf16 ? float(bf16(exact))
                                                                      : float(f16(exact))));
                         }
                         seen[param.name] += std::int64_t(values.size());
                       }));
  for (const Param& param : source.table.all()) CHECK(seen[param.name] == param.size());
}

}  // namespace

TEST_CASE("an export reads back, in every dtype", "[export]") {
  const DType dtype = GENERATE(DType::f32, DType::bf16, DType::f16);
  const Source source;
  source.run(dtype);
  check_weights(source, dtype);
  CHECK(names_in(source.path("out")) ==
        Names{"chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"});
  CHECK(names_in(source.path()) == Names{"in", "out"});
  CHECK(read(source.path("out/tokenizer.json")) == "{\"a\": 1}");
  CHECK(source.config()["torch_dtype"] == (dtype == DType::f32    ? "float32"
                                           : dtype == DType::bf16 ? "bfloat16"
                                                                  : "float16"));
}

TEST_CASE("config.json keeps its fields and gets the dtype of the export", "[export]") {
  json config = small;
  SECTION("written by hand") {
    const Source source(config);
    source.run();
    config["torch_dtype"] = "bfloat16";
    config["architectures"] = {"LlamaForCausalLM"};
    CHECK(source.config() == config);
  }
  SECTION("transformers 4") {
    config["torch_dtype"] = "float32";
    config["architectures"] = {"MyLlama"};
    const Source source(config);
    source.run();
    config["torch_dtype"] = "bfloat16";
    CHECK(source.config() == config);
  }
  SECTION("transformers 5") {
    config["dtype"] = "float32";
    config["architectures"] = {"LlamaForCausalLM"};
    const Source source(config);
    source.run(DType::f16);
    config["dtype"] = "float16";
    CHECK(source.config() == config);
  }
}

TEST_CASE("generation_config.json is copied or made from config.json", "[export]") {
  const Source source;
  source.run();
  CHECK(json::parse(read(source.path("out/generation_config.json"))) ==
        json{{"_from_model_config", true}, {"bos_token_id", 1}, {"eos_token_id", {2, 3}}});
  source.write("in/generation_config.json", "{\"temperature\": 0.5}");
  source.run();
  CHECK(read(source.path("out/generation_config.json")) == "{\"temperature\": 0.5}");
}

TEST_CASE("shards respect their limit and the index names them", "[export]") {
  const Source source;
  source.run(DType::f32, 200);
  check_weights(source, DType::f32);
  const json index = json::parse(read(source.path("out/model.safetensors.index.json")));
  CHECK(index["metadata"] ==
        json{{"total_size", 4 * source.table.count()}, {"total_parameters", source.table.count()}});
  CHECK(index["weight_map"].size() == source.table.all().size());
  std::map<std::string, std::int64_t> bytes;
  for (const Param& param : source.table.all()) bytes[index["weight_map"][param.name]] += 4 * param.size();
  CHECK(bytes.size() > 3);
  CHECK(bytes.begin()->first == "model-00001-of-" + bytes.rbegin()->first.substr(15));
  for (const auto& [file, size] : bytes) CHECK(size <= 200);
  CHECK_FALSE(fs::exists(source.path("out/model.safetensors")));
}

TEST_CASE("an older export is replaced, and kept when the new one fails", "[export]") {
  const Source source;
  source.run(DType::f32);
  fs::create_directory(source.path("out/sub"));
  const auto broken = [](const Param&, std::int64_t, std::span<float>) { fail("the device went away"); };
  CHECK(
      refusal(
          source.path(),
          [&] {
            export_model(source.path("out"), {source.path("in"), source.path("in")}, source.table, DType::bf16, broken);
          },
          ExitCode::internal) == "the device went away");
  check_weights(source, DType::f32);
  CHECK(names_in(source.path()) == Names{"in", "out"});
  source.run(DType::bf16);
  check_weights(source, DType::bf16);
  CHECK_FALSE(fs::exists(source.path("out/sub")));
  CHECK(names_in(source.path()) == Names{"in", "out"});
}

TEST_CASE("a full disk leaves no export and no rubbish", "[export]") {
  const Source source;
  const std::string message = refusal(
      source.path(),
      [&] {
        const FileLimit full(600);
        source.run();
      },
      ExitCode::internal);
  CHECK(message == ".out.partial/model.safetensors.partial: cannot write: File too large");
  CHECK(names_in(source.path()) == Names{"in"});
}

// tools/golden/check_export.py runs this with a folder made by transformers and loads the result there.
TEST_CASE("export of a given folder", "[.][by-hand]") {
  const char *from = std::getenv("EXPORT_FROM"), *to = std::getenv("EXPORT_TO"), *dtype = std::getenv("EXPORT_DTYPE");
  REQUIRE((from && to && dtype));
  const ParamTable table = param_table(read_model_spec(from));
  std::vector<float> flat(std::size_t(table.storage_size()));
  REQUIRE(load_weights(from, table, table, [&](const Param& param, std::int64_t first, std::span<const float> values) {
    std::copy(values.begin(), values.end(), flat.begin() + param.offset + first);
  }));
  const auto reader = [&](const Param& param, std::int64_t first, std::span<float> values) {
    std::copy_n(flat.begin() + param.offset + first, values.size(), values.begin());
  };
  const std::map<std::string, DType> types = {
      {"float32", DType::f32}, {"bfloat16", DType::bf16}, {"float16", DType::f16}};
  export_model(to, {from, from}, table, types.at(dtype), reader, 20'000);
}
