#include "io/config_file.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <utility>

#include "core/error.h"
#include "core/nearest_name.h"
#include "io/config_values.h"
#include "io/interpolation.h"
#include "io/yaml_tree.h"

namespace distill {

namespace {

constexpr std::uintmax_t largest_file = 1 << 20;  // a configuration has a few kilobytes; more is a wrong path

std::string join(std::string_view section, std::string_view key) {
  return section.empty() ? std::string(key) : text(section, ".", key);
}

// --- keys

// Another spelling of a key.
struct Alias {
  std::string_view alias, key;
};
constexpr auto aliases = std::to_array<Alias>({
    {"student.training_args.max_grad_norm", "max_grad_norm"},
    {"student.strategy_args.strategy_config.tp_size",
     "student.strategy_args.strategy_config.tensor_model_parallel_size"},
    {"student.strategy_args.strategy_config.pp_size",
     "student.strategy_args.strategy_config.pipeline_model_parallel_size"},
    {"teacher.strategy_args.strategy_config.tp_size",
     "teacher.strategy_args.strategy_config.tensor_model_parallel_size"},
    {"teacher.strategy_args.strategy_config.pp_size",
     "teacher.strategy_args.strategy_config.pipeline_model_parallel_size"},
});

bool is_alias(std::string_view path) {
  return std::any_of(aliases.begin(), aliases.end(), [&](const Alias& row) { return row.alias == path; });
}

// Keys of the established pipeline that change nothing here. '*' is student, teacher or validation.
struct Meaningless {
  std::string_view section, keys;
};
constexpr auto meaningless = std::to_array<Meaningless>({
    {"",
     " hydra defaults system_envs rpc_timeout num_nodes num_gpus_per_node pg_variant tracker_kwargs base_dir "
     "rollout_dump_dir rollout_batch_size val_batch_size local_rank prompt_length response_length val_prompt_length "
     "val_sequence_length profiler_memory profiler_output_dir length_profiler_dir report_length_and_rewards "
     "model_update_buffer_size_mb model_download_type rollout_mock is_offload_optimizer_states_in_train_step "
     "generate_opt_level is_num_return_sequences_expand max_running_requests is_use_additional_prompts "
     "max_additional_running_prompts user_defined_rollout_loop_cls "},
    {"checkpoint_config", " async_upload keep_local_file "},
    {"validation", " model_args training_args strategy_args generating_args device_mapping infer_batch_size "},
    {"*",
     " name worker_cls pg_variant generating_args world_size num_gpus_per_worker model_update_frequency "
     "backend_timeout "
     "system_envs topr_positive_weight topr_negative_weight max_concurrency use_dynamic_batching_in_train "
     "max_tokens_per_microbatch_in_train sequence_length_round_in_train use_dynamic_batching_in_infer "
     "max_tokens_per_microbatch_in_infer sequence_length_round_in_infer offload_nccl logits_in_fp32 apply_loss_scale "},
    {"*.model_args",
     " device_map gradient_checkpointing_use_reentrant moe_aux_loss_coef num_labels ulysses_size vision_dp "},
    {"*.data_args",
     " domain_interleave_probs interleave_probs preprocessing_num_workers cache_path dataset_dir dataset_type "
     "eval_file_name tag id prompt response messages "},
    {"*.training_args",
     " bf16 fp16 seed output_dir logging_dir max_steps logging_steps save_steps per_device_eval_batch_size do_train "
     "do_eval dataloader_num_workers dataloader_pin_memory gradient_checkpointing remove_unused_columns report_to "
     "overwrite_output_dir save_strategy "},
    {"teacher.training_args", " max_grad_norm "},
    {"*.sequence_packing_args",
     " max_packed_sequence_length_forward max_packed_sequence_length_train min_num_micro_batches_forward "
     "min_num_micro_batches_train "},
    {"*.strategy_args.strategy_config",
     " bf16 fp16 overlap_param_gather overlap_p2p_comm expert_model_parallel_size expert_tensor_parallel_size "
     "moe_token_dispatcher_type moe_grouped_gemm moe_layer_recompute moe_aux_loss_coeff "
     "moe_shared_expert_overlap recompute_method recompute_num_layers recompute_modules apply_rope_fusion "
     "bias_activation_fusion bias_dropout_fusion masked_softmax_fusion gradient_accumulation_fusion "
     "accumulate_allreduce_grads_in_fp32 distribute_saved_activations variable_seq_lengths delay_wgrad_compute "
     "transformer_impl attention_backend account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split "
     "tp_comm_overlap additional_configs zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer "
     "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping steps_per_print "
     "wall_clock_breakdown communication_data_type "},
});

bool matches(std::string_view pattern, std::string_view section) {
  if (!pattern.starts_with('*')) return pattern == section;
  const std::string_view role = section.substr(0, section.find('.'));
  return (role == "student" || role == "teacher" || role == "validation") &&
         pattern.substr(1) == section.substr(role.size());
}

bool is_meaningless(std::string_view section, std::string_view key) {
  return std::any_of(meaningless.begin(), meaningless.end(), [&](const Meaningless& row) {
    return matches(row.section, section) && row.keys.find(text(" ", key, " ")) != std::string_view::npos;
  });
}

// --- visitors

// All dotted keys.
struct KeyList {
  std::vector<std::string> keys;
  std::string section_path;

  template <class T>
  void operator()(std::string_view key, const T&, const Rule&, std::string_view) {
    keys.push_back(join(section_path, key));
  }
  template <class S>
  void section(std::string_view key, const S& fields) {
    const std::string outer = std::exchange(section_path, join(section_path, key));
    S::visit(fields, *this);
    section_path = outer;
  }
};

std::vector<std::string> all_keys() {
  KeyList list;
  const Config config;
  Config::visit(config, list);
  return std::move(list.keys);
}

// Fills the Config of a file from its tree.
class Reader {
 public:
  Reader(const YamlNode& root, ConfigFile& file) : interpolation_(root), file_(file), here_{"", &root, {}} {}

  void read() {
    Config::visit(file_.config, *this);
    sort_out_rest();
    for (const Unknown& unknown : unknown_)
      if (!interpolation_.is_used(*unknown.node)) fail_unknown(unknown);
    std::string list;
    for (const std::string& key : meaningless_) list += (list.empty() ? "" : ", ") + key;
    if (!list.empty())
      file_.warnings.push_back(text(file_.name, ": keys that have no meaning here are ignored: ", list));
  }

  template <class T>
  void operator()(std::string_view key, T& field, const Rule& rule, std::string_view) {
    here_.known.emplace_back(key);
    const std::string path = join(here_.path, key);
    const YamlNode* node = find<T>(path, key, rule);
    if (!node) return;
    const YamlNode value = interpolation_.expand(*node);
    if (is_absent(value)) return;
    const std::string found = read_value(field, value, rule);
    check_input(found.empty(), node->where, ": ", path, ": expected ", allowed(field, rule), ", found ", found);
    file_.written[path] = node->where;
  }

  template <class S>
  void section(std::string_view key, S& fields) {
    here_.known.emplace_back(key);
    const YamlNode* node = here_.map ? here_.map->find(key) : nullptr;
    const YamlNode* value = node ? &interpolation_.resolve(*node) : nullptr;
    if (value && value->kind == YamlNode::Kind::null) value = nullptr;
    const std::string path = join(here_.path, key);
    if (value && value->kind != YamlNode::Kind::map)
      fail_input(node->where, ": ", path, ": expected a section with keys of its own, found ", describe(*value));

    const Section outer = std::exchange(here_, {path, value, {}});
    S::visit(fields, *this);
    sort_out_rest();
    here_ = outer;
  }

 private:
  struct Section {
    std::string path;
    const YamlNode* map;  // none: the section is not written
    std::vector<std::string> known;
  };
  struct Unknown {
    std::string section, key;
    const YamlNode* node;
    std::vector<std::string> known;
  };

  // "~" and an empty text stand for the default.
  static bool is_absent(const YamlNode& value) {
    return value.kind == YamlNode::Kind::null || (value.kind == YamlNode::Kind::scalar && value.scalar.empty());
  }

  // The value of a key under its own name or another spelling.
  template <class T>
  const YamlNode* find(const std::string& path, std::string_view key, const Rule& rule) {
    const YamlNode* node = here_.map ? here_.map->find(key) : nullptr;
    for (const Alias& row : aliases) {
      const YamlNode* other = row.key == path ? interpolation_.lookup(row.alias) : nullptr;
      if (!other || is_absent(*other)) continue;
      if (node && !is_absent(interpolation_.resolve(*node)) && !same_value<T>(*node, *other, rule))
        fail_input(other->where, ": ", row.alias, " is ", describe(*other), ", but ", path, " is ",
                   describe(interpolation_.resolve(*node)), " (", node->where, "): expected one of the two keys");
      node = other;
    }
    return node;
  }

  // 1 and 1.0 are one value; what cannot be read is compared as text.
  template <class T>
  bool same_value(const YamlNode& a, const YamlNode& b, const Rule& rule) {
    T first{}, second{};
    const bool both_read = read_value(first, interpolation_.expand(a), rule).empty() &&
                           read_value(second, interpolation_.expand(b), rule).empty();
    return both_read ? first == second : interpolation_.resolve(a).scalar == interpolation_.resolve(b).scalar;
  }

  // Keys of this section that no field asked for.
  void sort_out_rest() {
    if (!here_.map) return;
    for (const YamlEntry& entry : here_.map->entries) {
      const std::string path = join(here_.path, entry.key);
      if (is_alias(path) || std::find(here_.known.begin(), here_.known.end(), entry.key) != here_.known.end()) continue;
      if (is_meaningless(here_.path, entry.key))
        meaningless_.insert(path);
      else
        unknown_.push_back({here_.path, entry.key, &entry.value, here_.known});
    }
  }

  [[noreturn]] static void fail_unknown(const Unknown& unknown) {
    const std::string guess = nearest_key(unknown);
    fail_input(unknown.node->where, ": unknown key '", join(unknown.section, unknown.key), "'",
               guess.empty() ? text(": distill --help-config lists all keys") : text(": did you mean '", guess, "'?"));
  }

  // A neighbour of nearly the same name, or the same or nearly the same name in another section.
  static std::string nearest_key(const Unknown& unknown) {
    const std::string sibling = nearest_name(unknown.key, unknown.known);
    if (!sibling.empty()) return join(unknown.section, sibling);
    const std::vector<std::string> keys = all_keys();
    std::vector<std::string> names;
    for (const std::string& key : keys) names.push_back(key.substr(key.rfind('.') + 1));
    const std::string name = nearest_name(unknown.key, names);
    return name.empty() ? "" : keys[std::size_t(std::find(names.begin(), names.end(), name) - names.begin())];
  }

  Interpolation interpolation_;
  ConfigFile& file_;
  Section here_;
  std::vector<Unknown> unknown_;
  std::set<std::string> meaningless_;
};

// Writes a Config as YAML.
class Writer {
 public:
  std::string write(const Config& config) {
    out_ << YAML::BeginMap;
    Config::visit(config, *this);
    out_ << YAML::EndMap;
    return out_.c_str();
  }

  template <class T>
  void operator()(std::string_view key, const T& field, const Rule&, std::string_view) {
    out_ << YAML::Key << std::string(key) << YAML::Value;
    put(field);
  }
  template <class S>
  void section(std::string_view key, const S& fields) {
    out_ << YAML::Key << std::string(key) << YAML::Value << YAML::BeginMap;
    S::visit(fields, *this);
    out_ << YAML::EndMap;
  }

 private:
  template <class T>
  void put(const T& value) {
    out_ << written(value);
  }
  template <class T>
  void put(const std::optional<T>& value) {
    if (value)
      put(*value);
    else
      out_ << YAML::Null;
  }
  // Text goes in quotes so that it stays text.
  void put(const std::string& value) {
    if (value.empty())
      out_ << YAML::Null;
    else
      out_ << YAML::DoubleQuoted << escape_interpolation(value);
  }
  void put(const Resume& value) {
    if (value.path.empty())
      out_ << written(value.wanted);
    else
      put(value.path);
  }
  void put(const std::vector<std::string>& values) {
    out_ << YAML::Flow << YAML::BeginSeq;
    for (const std::string& value : values) put(value);
    out_ << YAML::EndSeq;
  }
  void put(const std::vector<int>& values) {
    if (values.empty())
      out_ << YAML::Null;
    else
      out_ << YAML::Flow << values;
  }

  YAML::Emitter out_;
};

// Rows of the help: key, default, allowed values, meaning.
struct HelpTable {
  std::vector<std::array<std::string, 4>> rows;
  std::string section_path;

  template <class T>
  void operator()(std::string_view key, const T& field, const Rule& rule, std::string_view meaning) {
    rows.push_back({join(section_path, key), written(field), allowed(field, rule), std::string(meaning)});
  }
  template <class S>
  void section(std::string_view key, const S& fields) {
    const std::string outer = std::exchange(section_path, join(section_path, key));
    S::visit(fields, *this);
    section_path = outer;
  }
};

// Values of a section as text, by dotted path within it.
struct ValueList {
  std::map<std::string, std::string> values;
  std::string section_path;

  template <class T>
  void operator()(std::string_view key, const T& field, const Rule&, std::string_view) {
    values[join(section_path, key)] = written(field);
  }
  template <class S>
  void section(std::string_view key, const S& fields) {
    const std::string outer = std::exchange(section_path, join(section_path, key));
    S::visit(fields, *this);
    section_path = outer;
  }
};

// --- after reading

// Both roles read the same records and one of them trains: the student's values hold. Files of the established pipeline
// often repeat them for the teacher, and resolved files have every default, so only others are worth a word.
void warn_of_idle_teacher_keys(ConfigFile& file) {
  if (!file.config.needs_teacher()) return;
  constexpr std::array<std::string_view, 4> idle = {"data_args.", "training_args.", "use_sequence_packing",
                                                    "infer_batch_size"};
  ValueList student, teacher, defaults;
  WorkerConfig::visit(file.config.student, student);
  WorkerConfig::visit(file.config.teacher, teacher);
  const WorkerConfig untouched;
  WorkerConfig::visit(untouched, defaults);
  std::string list;
  for (const auto& [key, value] : teacher.values) {
    const std::string_view name = key;
    const bool is_idle = std::any_of(idle.begin(), idle.end(), [&](std::string_view k) { return name.starts_with(k); });
    if (is_idle && value != student.values.at(key) && value != defaults.values.at(key))
      list += text(list.empty() ? "" : ", ", "teacher.", key);
  }
  if (!list.empty())
    file.warnings.push_back(text(file.name, ": ignored, because the student's values hold for both roles: ", list));
}

// Sinks of other programs are left out with a warning; a run that asked for nothing else keeps the default.
void drop_unknown_sinks(ConfigFile& file) {
  std::vector<std::string> known;
  std::string unknown;
  for (const std::string& sink : file.config.track_with)
    if (std::find(metric_sink_names.begin(), metric_sink_names.end(), sink) != metric_sink_names.end())
      known.push_back(sink);
    else
      unknown += (unknown.empty() ? "" : ", ") + sink;
  if (unknown.empty()) return;
  if (known.empty()) known = Config().track_with;
  file.config.track_with = std::move(known);
  file.warnings.push_back(text(file.where("track_with"), ": track_with: ", unknown,
                               " is not available here and ignored: metrics go to ", written(file.config.track_with)));
}

std::string read_text(const std::filesystem::path& file) {
  std::error_code error;
  const auto status = std::filesystem::status(file, error);
  check_input(std::filesystem::exists(status), file.string(), ": no such configuration file");
  check_input(!std::filesystem::is_directory(status), file.string(), ": is a folder: expected a configuration file");
  const std::uintmax_t size = std::filesystem::file_size(file, error);
  check_input(error || size <= largest_file, file.string(), ": has ", size,
              " bytes: expected a configuration of at most ", largest_file);
  std::ifstream in(file, std::ios::binary);
  std::string content{std::istreambuf_iterator<char>(in), {}};
  check_input(in.good() || in.eof(), file.string(), ": cannot be read");
  return content;
}

}  // namespace

std::string ConfigFile::where(std::string_view key) const {
  const auto found = written.find(key);
  return found == written.end() ? name : found->second;
}

void ConfigFile::reading(std::string_view key, const std::function<void()>& work) const {
  try {
    work();
  } catch (const Error& error) {
    if (error.code() != ExitCode::bad_input) throw;
    fail_input(where(key), ": ", key, ": ", error.what());
  }
}

ConfigFile read_config(const std::filesystem::path& file, std::span<const std::string> overrides,
                       const Capabilities& capabilities) {
  ConfigFile result = parse_config(read_text(file), file, overrides);
  check_config(result, capabilities);
  return result;
}

ConfigFile parse_config(const std::string& content, const std::filesystem::path& name,
                        std::span<const std::string> overrides) {
  ConfigFile file;
  file.name = name.string();
  YamlNode root = parse_yaml(content, file.name);
  check_input(root.kind == YamlNode::Kind::map || root.kind == YamlNode::Kind::null, file.name,
              ": expected lines 'key: value', found ", describe(root));
  for (const std::string& assignment : overrides) apply_override(root, assignment);
  link_parents(root);
  Reader(root, file).read();
  drop_unknown_sinks(file);
  fill_defaults(file.config, name.stem().string());
  warn_of_idle_teacher_keys(file);
  if (file.config.is_offload_states)
    file.warnings.push_back(text(file.where("is_offload_states"),
                                 ": is_offload_states: true has no effect yet: all states stay in device memory"));
  return file;
}

void check_config(const ConfigFile& file, const Capabilities& capabilities) {
  for (const ConfigProblem& problem : not_supported(file.config, capabilities))
    if (file.written.contains(problem.key))
      fail_input(file.where(problem.key), ": ", problem.key, ": ", problem.message);
  for (const ConfigProblem& problem : rule_violations(file.config))
    fail_input(file.where(problem.key), ": ", problem.key, ": ", problem.message);
}

std::string to_yaml(const Config& config) {
  return "# Resolved configuration: every key, defaults included. Reading it gives the same run.\n" +
         Writer().write(config) + "\n";
}

std::string config_help() {
  HelpTable table;
  const Config config;
  Config::visit(config, table);
  constexpr std::size_t widest = 48;  // a longer cell pushes the rest of its line to the right
  std::array<std::size_t, 3> widths{};
  for (const auto& row : table.rows)
    for (std::size_t i = 0; i < widths.size(); ++i)
      if (i == 0 || row[i].size() <= widest) widths[i] = std::max(widths[i], row[i].size());
  std::ostringstream out;
  for (const auto& row : table.rows) {
    for (std::size_t i = 0; i < widths.size(); ++i)
      out << row[i] << std::string(std::max(widths[i], row[i].size()) - row[i].size() + 2, ' ');
    out << row.back() << '\n';
  }
  return out.str();
}

}  // namespace distill
