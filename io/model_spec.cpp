// config.json → ModelSpec. Defaults and meaning are those of the configuration classes of transformers 5.
#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "io/mapped_file.h"
#include "io/model_folder.h"
#include "io/strict_json.h"

namespace distill {

namespace {

using nlohmann::json;

enum class Window {
  ignored,   // the family has none
  always,    // every layer has sliding_window, null means none
  by_layer,  // use_sliding_window, max_window_layers and layer_types decide
};

// The defaults of a family's configuration class; 0 stands for null.
struct Family {
  const char* name;
  std::int64_t vocabulary, hidden, feed_forward, layers, heads, kv_heads, head_dim, max_positions;
  Window window;
  std::int64_t max_window_layers;
  bool qkv_bias, qk_norm, reads_attention_bias, reads_mlp_bias, hidden_is_multiple_of_heads;
};

constexpr std::int64_t default_window = 4096;  // of every family that has one
constexpr std::array families = {
    Family{"qwen2", 151936, 4096, 22016, 32, 32, 32, 0, 32768, Window::by_layer, 28, true, false, false, false, false},
    Family{"qwen3", 151936, 4096, 22016, 32, 32, 32, 128, 32768, Window::by_layer, 28, false, true, true, false, false},
    Family{"llama", 32000, 4096, 11008, 32, 32, 0, 0, 2048, Window::ignored, 0, false, false, true, true, true},
    Family{"mistral", 32000, 4096, 14336, 32, 32, 8, 0, 131072, Window::always, 0, false, false, false, false, false},
};

// An object of the file; every getter names file and field in its message.
class Fields {
 public:
  Fields(const json& object, std::string where) : object_(object), where_(std::move(where)) {}

  const json* find(const char* key) const {
    const auto found = object_.find(key);
    return found == object_.end() ? nullptr : &*found;
  }
  bool has_value(const char* key) const { return find(key) != nullptr && !find(key)->is_null(); }

  template <class... Expected>
  [[noreturn]] void refuse(const char* key, const json& found, const Expected&... expected) const {
    fail_input(where_, ": ", key, ": found ", shown(found), ", ", expected...);
  }

  std::int64_t positive(const char* key, std::int64_t fallback, std::int64_t most) const {
    const json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_number_integer() || *value < 1 || *value > most)
      refuse(key, *value, "expected an integer from 1 to ", most);
    return value->get<std::int64_t>();
  }
  // null reads as `if_null`, a missing field as `fallback`.
  std::int64_t positive_or_null(const char* key, std::int64_t fallback, std::int64_t if_null, std::int64_t most) const {
    return find(key) != nullptr && find(key)->is_null() ? if_null : positive(key, fallback, most);
  }
  double number(const char* key, double fallback, double least, double most) const {
    const json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_number() || !(value->get<double>() >= least && value->get<double>() <= most))
      refuse(key, *value, "expected a number from ", least, " to ", most);
    return value->get<double>();
  }
  double required_number(const char* key, double least, double most) const {
    check_input(find(key) != nullptr, where_, ": has no ", key);
    return number(key, 0, least, most);
  }
  bool flag(const char* key, bool fallback) const {
    const json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) refuse(key, *value, "expected true or false");
    return value->get<bool>();
  }
  // The string, or nothing when the field is missing or null.
  std::optional<std::string> string(const char* key) const {
    if (!has_value(key)) return std::nullopt;
    if (!find(key)->is_string()) refuse(key, *find(key), "expected a string");
    return find(key)->get<std::string>();
  }
  const std::string& where() const { return where_; }

 private:
  const json& object_;
  std::string where_;
};

constexpr std::int64_t most_rows = 1 << 30, most_width = 1 << 24, most_layers = 1 << 14, most_heads = 1 << 14;
constexpr double most_parameters = 1e14;  // far above any model; keeps every size and offset within 64 bits

const Family& family_of(const Fields& fields) {
  const auto type = fields.string("model_type");
  check_input(type.has_value(), fields.where(), ": has no model_type; supported: qwen2, qwen3, llama, mistral");
  const auto found = std::find_if(families.begin(), families.end(), [&](const Family& f) { return f.name == *type; });
  if (found == families.end()) fields.refuse("model_type", *type, "supported: qwen2, qwen3, llama, mistral");
  return *found;
}

void refuse_what_changes_the_maths(const Fields& fields, const Family& family) {
  if (const auto act = fields.string("hidden_act"); act && *act != "silu")
    fields.refuse("hidden_act", *act, "supported: \"silu\"");
  if (family.reads_attention_bias && fields.flag("attention_bias", false))
    fields.refuse("attention_bias", true, "supported for ", family.name, ": false");
  if (family.reads_mlp_bias && fields.flag("mlp_bias", false))
    fields.refuse("mlp_bias", true, "supported for ", family.name, ": false");
  if (fields.has_value("attention_dropout") && fields.number("attention_dropout", 0, 0, 1) != 0)
    fields.refuse("attention_dropout", *fields.find("attention_dropout"), "supported: 0");
  if (fields.has_value("quantization_config"))
    fields.refuse("quantization_config", *fields.find("quantization_config"),
                  "quantised models are not supported: use the folder with the original weights");
}

void check_partial_rotary(const Fields& fields) {
  if (fields.has_value("partial_rotary_factor") && fields.number("partial_rotary_factor", 1, 0, 1) != 1)
    fields.refuse("partial_rotary_factor", *fields.find("partial_rotary_factor"), "supported: 1");
}

Llama3RopeScaling read_llama3_scaling(const Fields& rope, const Fields& config, std::int64_t max_positions) {
  Llama3RopeScaling scaling;
  scaling.factor = rope.required_number("factor", 1, 1e6);
  scaling.low_freq_factor = rope.required_number("low_freq_factor", 1e-6, 1e6);
  scaling.high_freq_factor = rope.required_number("high_freq_factor", 1e-6, 1e6);
  if (scaling.high_freq_factor <= scaling.low_freq_factor)
    rope.refuse("high_freq_factor", scaling.high_freq_factor, "expected more than low_freq_factor (",
                scaling.low_freq_factor, ')');
  const Fields& original = config.find("original_max_position_embeddings") ? config : rope;
  scaling.original_max_positions = original.positive("original_max_position_embeddings", max_positions, most_rows);
  return scaling;
}

// transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters with both in it; where a file has
// several, the order of precedence is that of transformers 5.
void read_rope(const Fields& config, ModelSpec& spec) {
  check_partial_rotary(config);
  const double theta = config.number("rope_theta", 10000, 1e-3, 1e15);
  const bool is_old = config.has_value("rope_scaling") && !config.find("rope_scaling")->empty();
  const char* key = is_old ? "rope_scaling" : "rope_parameters";
  spec.rope_theta = theta;
  if (!config.has_value(key)) return;
  const json& object = *config.find(key);
  if (!object.is_object()) config.refuse(key, object, "expected an object");
  const Fields rope(object, text(config.where(), ": ", key));
  check_partial_rotary(rope);
  spec.rope_theta = rope.number("rope_theta", theta, 1e-3, 1e15);
  const std::string type = rope.string(rope.find("rope_type") ? "rope_type" : "type").value_or("default");
  if (type == "llama3")
    spec.rope_scaling = read_llama3_scaling(rope, config, spec.max_positions);
  else if (type != "default")
    rope.refuse("rope_type", type, "supported: \"default\", \"llama3\"");
}

// 0: every layer sees all positions before it. Layers that differ are not supported.
std::int64_t read_layered_window(const Fields& config, const Family& family, std::int64_t layers) {
  const bool used = config.flag("use_sliding_window", false);
  const std::int64_t size = config.positive_or_null("sliding_window", default_window, 0, most_rows);
  const std::int64_t window = used ? size : 0;
  const json* first_layer = config.find("max_window_layers");
  if (first_layer && (!first_layer->is_number_integer() || *first_layer < 0))
    config.refuse("max_window_layers", *first_layer, "expected a non-negative integer");
  std::int64_t sliding = 0;
  if (config.has_value("layer_types")) {
    const json& types = *config.find("layer_types");
    if (!types.is_array() || std::int64_t(types.size()) != layers)
      config.refuse("layer_types", types, "expected a list of num_hidden_layers (", layers, ") names");
    for (const json& type : types) {
      if (type != "full_attention" && type != "sliding_attention")
        config.refuse("layer_types", type, "supported: \"full_attention\", \"sliding_attention\"");
      sliding += type == "sliding_attention";
    }
    if (sliding > 0 && window == 0)
      config.refuse("layer_types", types, "but use_sliding_window and sliding_window give no window");
  } else if (window > 0) {
    const std::int64_t full = first_layer ? first_layer->get<std::int64_t>() : family.max_window_layers;
    sliding = layers - std::min(layers, full);
  }
  check_input(sliding == 0 || sliding == layers, config.where(), ": ", sliding, " of ", layers,
              " layers have a sliding window (use_sliding_window, max_window_layers, layer_types); supported: all "
              "layers or none");
  return sliding == 0 ? 0 : window;
}

void read_window(const Fields& config, const Family& family, ModelSpec& spec) {
  std::int64_t window = 0;
  if (family.window == Window::always)
    window = config.positive_or_null("sliding_window", default_window, 0, most_rows);
  else if (family.window == Window::by_layer)
    window = read_layered_window(config, family, spec.layers);
  spec.sliding_window = int(window);
}

void read_sizes(const Fields& config, const Family& family, ModelSpec& spec) {
  spec.vocabulary = config.positive("vocab_size", family.vocabulary, most_rows);
  spec.hidden = config.positive("hidden_size", family.hidden, most_width);
  spec.feed_forward = config.positive("intermediate_size", family.feed_forward, most_width);
  spec.layers = int(config.positive("num_hidden_layers", family.layers, most_layers));
  const std::int64_t heads = config.positive("num_attention_heads", family.heads, most_heads);
  const std::int64_t kv_heads = config.positive_or_null("num_key_value_heads", family.kv_heads, 0, most_heads);
  const std::int64_t head_dim = config.positive_or_null("head_dim", family.head_dim, 0, most_width);
  spec.q_heads = int(heads);
  spec.kv_heads = int(kv_heads == 0 ? heads : kv_heads);
  spec.head_dim = int(head_dim == 0 ? spec.hidden / heads : head_dim);
  spec.max_positions = config.positive("max_position_embeddings", family.max_positions, most_rows);
  check_input(!family.hidden_is_multiple_of_heads || spec.hidden % heads == 0, config.where(), ": hidden_size (",
              spec.hidden, ") is not a multiple of num_attention_heads (", heads, ')');
  check_input(heads % spec.kv_heads == 0, config.where(), ": num_attention_heads (", heads,
              ") is not a multiple of num_key_value_heads (", spec.kv_heads, ')');
  check_input(spec.head_dim > 0 && spec.head_dim % 2 == 0, config.where(), ": head_dim is ", spec.head_dim,
              ", expected an even number above 0: rotary embeddings turn pairs");
  const double block =
      double(spec.hidden) * (2.0 * double(spec.q_cols() + spec.kv_cols()) + 3.0 * double(spec.feed_forward));
  check_input(2.0 * double(spec.vocabulary) * double(spec.hidden) + spec.layers * block < most_parameters,
              config.where(), ": the sizes make a model of more than ", most_parameters, " parameters");
}

}  // namespace

ModelSpec parse_model_spec(std::string_view content, const std::string& path) {
  const json object = parse_strict_json(content, path);
  check_input(object.is_object(), path, ": found ", shown(object), ", expected an object");
  const Fields config(object, path);
  const Family& family = family_of(config);
  refuse_what_changes_the_maths(config, family);
  ModelSpec spec;
  spec.family = family.name;
  spec.qkv_bias = family.qkv_bias;
  spec.qk_norm = family.qk_norm;
  read_sizes(config, family, spec);
  spec.norm_eps = float(config.number("rms_norm_eps", 1e-6, 0, 1));
  spec.tied_head = config.flag("tie_word_embeddings", false);
  spec.initializer_range = config.number("initializer_range", 0.02, 0, 1);
  read_rope(config, spec);
  read_window(config, family, spec);
  return spec;
}

ModelSpec read_model_spec(const std::string& folder) {
  check_input(std::filesystem::is_directory(folder), folder,
              ": no such folder (models are read from local folders: download the model first)");
  const std::string path = std::filesystem::path(folder) / "config.json";
  check_input(std::filesystem::exists(path), folder, ": has no config.json: not a Hugging Face model folder");
  return parse_model_spec(MappedFile(path).bytes(), path);
}

}  // namespace distill
