#include "io/config_file.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <concepts>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>

#include "test/support/limit.h"
#include "test/support/refusal.h"

using namespace distill;

namespace {

using Overrides = std::vector<std::string>;

// What every configuration needs; five lines.
const std::string needed =
    "student_pretrain: s\n"
    "teacher_pretrain: t\n"
    "student:\n"
    "  data_args:\n"
    "    file_name: d.json\n";

ConfigFile parse(const std::string& content, const Overrides& overrides = {}, const Capabilities& capabilities = {}) {
  ConfigFile file = parse_config(content, "x.yaml", overrides);
  check_config(file, capabilities);
  return file;
}
Config read(const std::string& content, const Overrides& overrides = {}) { return parse(content, overrides).config; }

// The message of the input error that reading ends with.
std::string refused(const std::string& content, const Overrides& overrides = {}) {
  return test::refusal("", [&] { parse(content, overrides); });
}

struct Keys {
  std::vector<std::string> keys;
  std::string section_path;
  template <class T>
  void operator()(std::string_view key, const T&, const Rule&, std::string_view meaning) {
    CHECK_FALSE(meaning.empty());
    keys.push_back(section_path + std::string(key));
  }
  template <class S>
  void section(std::string_view key, const S& fields) {
    const std::string outer = section_path;
    section_path += std::string(key) + ".";
    S::visit(fields, *this);
    section_path = outer;
  }
};

std::vector<std::string> all_keys() {
  Keys keys;
  const Config config = Config();
  Config::visit(config, keys);
  return keys.keys;
}

// Gives every field a random allowed value.
class Randomizer {
 public:
  explicit Randomizer(std::uint64_t seed) : random_(seed) {}

  template <class T>
  void operator()(std::string_view, T& field, const Rule& rule, std::string_view) {
    fill(field, rule);
  }
  template <class S>
  void section(std::string_view, S& fields) {
    S::visit(fields, *this);
  }

 private:
  std::int64_t between(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random_);
  }
  bool coin() { return between(0, 1) == 1; }

  void fill(bool& value, const Rule&) { value = coin(); }
  template <std::signed_integral T>
  void fill(T& value, const Rule& rule) {
    const auto low = static_cast<std::int64_t>(rule.low);
    value = static_cast<T>(coin() ? between(low, low + 3) : between(low, std::numeric_limits<T>::max()));
  }
  void fill(double& value, const Rule& rule) {
    const double high = std::isfinite(rule.high) ? rule.high : std::pow(10.0, static_cast<double>(between(-12, 18)));
    do {
      value = std::uniform_real_distribution<double>(rule.low, high)(random_);
    } while ((rule.excludes_low && value <= rule.low) || (rule.excludes_high && value >= rule.high));
  }
  void fill(Seconds& value, const Rule& rule) {
    double seconds = static_cast<double>(between(1, 1000000));
    if (coin()) fill(seconds, rule);
    value = Seconds(seconds);
  }
  void fill(std::string& value, const Rule& rule) {
    if (!rule.names.empty()) {
      value = rule.names[static_cast<std::size_t>(between(0, std::int64_t(rule.names.size()) - 1))];
      return;
    }
    static const std::vector<std::string> pieces = {"a",    "model", "/",   " ",          "~",
                                                    "null", "true",  "010", "${",         "}",
                                                    "\\",   "\\\\",  "'",   "\"",         "# no comment",
                                                    ": ",   "- ",    "&",   "*a",         "\n",
                                                    "\t",   "é",     "中",  "\U0001f600", "${oc.env:HOME}",
                                                    "%",    "@",     "[",   "{",          ","};
    value.clear();
    for (std::int64_t n = between(1, 6); n > 0; --n)
      value += pieces[static_cast<std::size_t>(between(0, std::int64_t(pieces.size()) - 1))];
  }
  template <class E>
  requires std::is_enum_v<E>
  void fill(E& value, const Rule&) {
    value = choices<E>[static_cast<std::size_t>(between(0, std::int64_t(choices<E>.size()) - 1))].value;
  }
  void fill(Resume& value, const Rule& rule) {
    value = {coin(), ""};
    if (value.wanted && coin()) fill(value.path, rule);
  }
  void fill(std::vector<std::string>& value, const Rule&) {
    // Sinks of metrics are the one list of names; they are paths as well as any.
    value.clear();
    for (std::int64_t n = between(0, 3); n > 0; --n) fill(value.emplace_back(), Rule{.names = metric_sink_names});
  }
  void fill(std::vector<int>& value, const Rule& rule) {
    value.clear();
    for (std::int64_t n = between(0, 3); n > 0; --n) fill(value.emplace_back(), rule);
  }
  template <class T>
  void fill(std::optional<T>& value, const Rule& rule) {
    value.reset();
    if (coin()) fill(value.emplace(), rule);
  }
  template <class T>
  void fill(AutoOr<T>& value, const Rule& rule) {
    fill(value.value, rule);
  }

  std::mt19937_64 random_;
};

}  // namespace

TEST_CASE("a file of the established pipeline runs unchanged") {
  const ConfigFile file = read_config(DISTILL_SOURCE_DIR "/test/data/roll_style_distill.yaml", {}, {});
  const Config& config = file.config;
  CHECK(config.exp_name == "distill_cpu");
  CHECK(config.checkpoint_config.output_dir == "/var/tmp/ckpt/distill_cpu");
  CHECK(config.track_with == std::vector<std::string>{"csv", "hdf5", "tensorboard"});
  CHECK(config.logits_topk == 64);
  CHECK(config.distill_loss_weight == 0.85);
  CHECK(config.max_grad_norm == 1);
  CHECK(config.question_key == "question_zh");
  CHECK(config.student.model_args.model_name_or_path == "models/student");
  CHECK(config.student.model_args.attn_implementation == AttentionHint::fa2);
  CHECK(config.student.training_args.learning_rate == 2e-5);
  CHECK(config.student.training_args.gradient_accumulation_steps == 4);
  CHECK(config.student.device_mapping == std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7});
  CHECK(config.student.strategy_args.strategy_config.recompute_granularity == Recompute::full);
  CHECK(config.teacher.data_args.template_name == "qwen2_5");
  CHECK(config.teacher.strategy_args.strategy_config == StrategyConfig());  // hydra would take it from another file
  CHECK(config.teacher.model_args.disable_gradient_checkpointing);
  CHECK(config.teacher.infer_batch_size == 4);

  REQUIRE(file.warnings.size() == 3);
  CHECK(file.warnings[0] ==
        file.name +
            ": keys that have no meaning here are ignored: defaults, hydra, num_gpus_per_node, num_nodes, rpc_timeout, "
            "student.data_args.preprocessing_num_workers, "
            "student.strategy_args.strategy_config.expert_model_parallel_size, student.worker_cls, system_envs, "
            "tracker_kwargs");
  CHECK(file.warnings[1] ==
        file.name + ":20: track_with: wandb is not available here and ignored: metrics go to [csv, hdf5, tensorboard]");
  CHECK(file.warnings[2] ==
        file.name + ": ignored, because the student's values hold for both roles: teacher.infer_batch_size");
}

TEST_CASE("defaults") {
  const ConfigFile file = parse(needed);
  CHECK(file.warnings.empty());
  Config expected;
  expected.exp_name = "x";
  expected.student_pretrain = "s";
  expected.teacher_pretrain = "t";
  expected.student.data_args.file_name = {"d.json"};
  fill_defaults(expected, "x");
  CHECK(file.config == expected);
  CHECK(parse_config("", "runs/small.yaml", {}).config.exp_name == "small");
  CHECK(parse_config("# nothing but a comment\n", "runs/small.yaml", {}).config.exp_name == "small");
}

TEST_CASE("null and empty text stand for the default") {
  CHECK(read(needed + "seed: ~\nexp_name: null\nmax_steps:\nquestion_key: ''\nteacher: ~\ncheckpoint_config:\n") ==
        read(needed));
}

TEST_CASE("where a key was written") {
  const ConfigFile file = parse(needed + "seed: 7\n", {"max_steps=3"});
  CHECK(file.where("student.data_args.file_name") == "x.yaml:5");
  CHECK(file.where("seed") == "x.yaml:6");
  CHECK(file.where("max_steps") == "command line 'max_steps=3'");
  CHECK(file.where("output_dir") == "x.yaml");
}

TEST_CASE("values of each kind") {
  const auto with = [](const std::string& line) { return read(needed + line + "\n"); };
  CHECK(with("seed: +12").seed == 12);
  CHECK(with("seed: 0").seed == 0);
  CHECK(with("seed: 9223372036854775807").seed == 9223372036854775807);
  CHECK(with("max_steps: -1").max_steps == -1);
  CHECK(with("seed: '5'").seed == 5);
  CHECK(with("skew_lambda: 1e-3").skew_lambda == 1e-3);
  CHECK(with("skew_lambda: .25").skew_lambda == 0.25);
  CHECK(with("kd_temperature: 2").kd_temperature == 2);
  CHECK(with("kd_temperature: +2.").kd_temperature == 2);
  for (const char* yes : {"true", "True", "yes", "on", "'true'"})
    CHECK(with(std::string("distill_on_prompt: ") + yes).distill_on_prompt);
  for (const char* no : {"false", "FALSE", "No", "off"})
    CHECK_FALSE(with(std::string("distill_on_prompt: ") + no).distill_on_prompt);
  CHECK(with("exp_name: 12").exp_name == "12");
  CHECK(with("exp_name: 'null'").exp_name == "null");
  CHECK(with("exp_name: !!str 010").exp_name == "010");
  CHECK(with("kd_objective: js_divergence").kd_objective == Objective::js_divergence);
  CHECK(with("logits_topk_mode: tail").logits_topk_mode == TopkMode::tail);
  CHECK(with("logits_chunk: 64").logits_chunk.value == 64);
  CHECK_FALSE(with("logits_chunk: auto").logits_chunk.value);
  CHECK(with("peak_flops: 1e12").peak_flops.value == 1e12);
  CHECK(with("resume_from_checkpoint: true").resume_from_checkpoint == Resume{true, ""});
  CHECK(with("resume_from_checkpoint: False").resume_from_checkpoint == Resume{false, ""});
  CHECK(with("resume_from_checkpoint: out/step-000100").resume_from_checkpoint == Resume{true, "out/step-000100"});
  CHECK(with("resume_from_checkpoint: 'true'").resume_from_checkpoint == Resume{true, "true"});
  CHECK(with("track_with: csv").track_with == std::vector<std::string>{"csv"});
  CHECK(with("track_with: []").track_with.empty());
  CHECK(with("validation: {data_args: {file_name: [a, b]}}").validation.data_args.file_name ==
        std::vector<std::string>{"a", "b"});
}

TEST_CASE("durations") {
  const auto limit = [](const std::string& duration) {
    return parse_config("max_time: " + duration, "x.yaml", {}).config.max_time->count();
  };
  CHECK(limit("90") == 90);
  CHECK(limit("20s") == 20);
  CHECK(limit("250ms") == 0.25);
  CHECK(limit("10min") == 600);
  CHECK(limit("10m") == 600);
  CHECK(limit("3h55m") == 3 * 3600 + 55 * 60);
  CHECK(limit("1.5h") == 5400);
  CHECK(limit("1d2h3min4s") == 86400 + 2 * 3600 + 3 * 60 + 4);
  for (const char* wrong : {"h", "3h5", "3 h", "-5s", "0", "1e400", "5y", "1..5s", "soon"})
    CHECK(refused(needed + "max_time: " + wrong) ==
          std::string("x.yaml:6: max_time: expected a duration above 0 (90s, 10min, 3h55m), found '") + wrong + "'");
}

TEST_CASE("device lists") {
  const auto devices = [](const std::string& list) {
    return parse_config("student: {device_mapping: " + list + "}", "x.yaml", {}).config.student.device_mapping;
  };
  using Devices = std::vector<int>;
  CHECK(devices("[2, 0]") == Devices{2, 0});
  CHECK(devices("'[2, 0]'") == Devices{2, 0});
  CHECK(devices("'list(range(0,3))'") == Devices{0, 1, 2});
  CHECK(devices("'list(range(3))'") == Devices{0, 1, 2});
  CHECK(devices("'range(1, 3)'") == Devices{1, 2});
  CHECK(devices("' list ( range ( 0 , 8 , 3 ) ) '") == Devices{0, 3, 6});
  CHECK(devices("'list(range(7,0,-3))'") == Devices{7, 4, 1});
  CHECK(devices("'list(range(0,2)) + list(range(4,6)) + [9]'") == Devices{0, 1, 4, 5, 9});
  CHECK(devices("~").empty());
}

TEST_CASE("wrong device lists") {
  const auto message = [](const std::string& list) { return refused(needed + "  device_mapping: " + list); };
  const std::string expected =
      "x.yaml:6: student.device_mapping: expected a list of integers at least 0, or list(range(start,stop,step)), "
      "found ";
  for (const char* wrong : {"list(range(0,8)", "list(range())", "list(range(1,2,3,4))", "list(range(0,4,0))",
                            "__import__('os')", "list(range(0,a))", "list(range(0,2)) and 3", "list(range(0,2)) +",
                            "list(range(0,1000000000))", "list(range(0,99999999999))", "all"})
    CHECK(message("\"" + std::string(wrong) + "\"") == expected + "'" + wrong + "'");
  CHECK(message("list(range(2,-2,-1))") == expected + "'list(range(2,-2,-1))', which holds -1");
  CHECK(message("list(range(4,0))") == expected + "an empty list");
  CHECK(message("[]") == expected + "an empty list");
  CHECK(message("[0, x]") == expected + "a list whose element 2 is 'x'");
  CHECK(message("[0, -1]") == expected + "a list whose element 2 is '-1'");
  CHECK(message("{a: 1}") == expected + "a section");
  CHECK(message("[0, 0]") == "x.yaml:6: student.device_mapping: names a device twice: expected distinct devices");
}

TEST_CASE("wrong types and values out of range name the line, the key, what is allowed and what was found") {
  struct Case {
    std::string line, message;
  };
  const auto wrong = GENERATE(values<Case>({
      {"seed: many", "seed: expected an integer at least 0, found 'many'"},
      {"seed: -1", "seed: expected an integer at least 0, found '-1'"},
      {"seed: 1.5", "seed: expected an integer at least 0, found '1.5'"},
      {"seed: 0x10", "seed: expected an integer at least 0, found '0x10'"},
      {"seed: [1]", "seed: expected an integer at least 0, found a list"},
      {"seed: {a: 1}", "seed: expected an integer at least 0, found a section"},
      {"save_steps: 010",
       "save_steps: expected an integer at least 0, found '010' (leading zero: write it in decimal)"},
      {"sequence_length: 1", "sequence_length: expected an integer at least 2, found '1'"},
      {"sequence_length: 3000000000",
       "sequence_length: expected an integer at least 2, found '3000000000' (the largest is 2147483647)"},
      {"max_steps: 99999999999999999999",
       "max_steps: expected an integer at least -1, found '99999999999999999999' (the largest is 9223372036854775807)"},
      {"distill_loss_weight: 1.5", "distill_loss_weight: expected a number at least 0 and at most 1, found '1.5'"},
      {"distill_loss_weight: half", "distill_loss_weight: expected a number at least 0 and at most 1, found 'half'"},
      {"kd_temperature: 0", "kd_temperature: expected a number above 0, found '0'"},
      {"kd_temperature: .inf", "kd_temperature: expected a number above 0, found '.inf'"},
      {"kd_temperature: inf", "kd_temperature: expected a number above 0, found 'inf'"},
      {"kd_temperature: nan", "kd_temperature: expected a number above 0, found 'nan'"},
      {"kd_temperature: 1,5", "kd_temperature: expected a number above 0, found '1,5'"},
      {"skew_lambda: 1", "skew_lambda: expected a number above 0 and below 1, found '1'"},
      {"distill_on_prompt: 2", "distill_on_prompt: expected true or false, found '2'"},
      {"exp_name: [a]", "exp_name: expected text, found a list"},
      {"kd_objective: kl",
       "kd_objective: expected forward_kl, reverse_kl, adaptive_kl, skewed_forward_kl, skewed_reverse_kl or "
       "js_divergence, found 'kl'"},
      {"logits_transfer_backend: ray", "logits_transfer_backend: expected ipc+nccl or nccl-only, found 'ray'"},
      {"logits_chunk: 0", "logits_chunk: expected auto or an integer at least 1, found '0'"},
      {"resume_from_checkpoint: [a]", "resume_from_checkpoint: expected true, false or a path, found a list"},
      {"track_with: {csv: 1}", "track_with: expected text or a list of texts, found a section"},
      {"track_with: [csv, ~]", "track_with: expected text or a list of texts, found a list whose element 2 is nothing"},
      {"checkpoint_config: {type: oss}", "checkpoint_config.type: expected file_system, found 'oss'"},
      {"validation: here", "validation: expected a section with keys of its own, found 'here'"},
      {"teacher: [a]", "teacher: expected a section with keys of its own, found a list"},
      {"teacher: {model_args: {dtype: int8}}", "teacher.model_args.dtype: expected bf16, fp16 or fp32, found 'int8'"},
      {"teacher: {model_args: {model_type: trl}}", "teacher.model_args.model_type: expected causal_lm, found 'trl'"},
      {"teacher: {data_args: {template: qwen}}",
       "teacher.data_args.template: expected native, qwen2_5, qwen3, chatml, llama3 or empty, found 'qwen'"},
      {"teacher: {training_args: {lr_scheduler_type: step}}",
       "teacher.training_args.lr_scheduler_type: expected constant, constant_with_warmup, linear or cosine, found "
       "'step'"},
  }));
  CHECK(refused(needed + wrong.line + "\n") == "x.yaml:6: " + wrong.message);
}

TEST_CASE("a long wrong value is shortened") {
  const std::string message = refused(needed + "seed: " + std::string(500, 'x'));
  CHECK(message == "x.yaml:6: seed: expected an integer at least 0, found '" + std::string(80, 'x') + "...'");
}

TEST_CASE("unknown keys") {
  CHECK(refused(needed + "sead: 1\n") == "x.yaml:6: unknown key 'sead': did you mean 'seed'?");
  CHECK(refused("studnet_pretrain: s\n") ==
        "x.yaml:1: unknown key 'studnet_pretrain': did you mean 'student_pretrain'?");
  CHECK(refused(needed + "  training_args:\n    learning_rat: 1\n") ==
        "x.yaml:7: unknown key 'student.training_args.learning_rat': did you mean "
        "'student.training_args.learning_rate'?");
  CHECK(refused(needed + "learning_rate: 1\n") ==
        "x.yaml:6: unknown key 'learning_rate': did you mean 'student.training_args.learning_rate'?");
  CHECK(refused(needed + "zzz: 1\n") == "x.yaml:6: unknown key 'zzz': distill --help-config lists all keys");
  CHECK(refused(needed, {"teacher.model_args.dtyp=fp32"}) ==
        "command line 'teacher.model_args.dtyp=fp32': unknown key 'teacher.model_args.dtyp': did you mean "
        "'teacher.model_args.dtype'?");
  CHECK(refused(needed, {"a.b=1"}) == "command line 'a.b=1': unknown key 'a': distill --help-config lists all keys");
}

TEST_CASE("an unknown key that other values refer to is a variable of the file") {
  const ConfigFile file = parse(needed + "lr: 1e-3\nnames: {run: mine}\nexp_name: ${names.run}\n" +
                                "teacher: {training_args: {learning_rate: '${lr}'}}\n");
  CHECK(file.config.exp_name == "mine");
  CHECK(file.config.teacher.training_args.learning_rate == 1e-3);
}

TEST_CASE("keys without a meaning here may hold anything and give one warning") {
  const ConfigFile file =
      parse(needed + "  worker_cls: a.b.C\nhydra: {run: {dir: '${now:%Y}'}}\nrpc_timeout: [\"${nothing}\"]\n" +
            "teacher: {training_args: {max_grad_norm: 3}, strategy_args: {strategy_config: {bf16: true}}}\n" +
            "validation: {generating_args: {top_k: 1}, data_args: {tag: x}}\n");
  REQUIRE(file.warnings.size() == 1);
  CHECK(file.warnings[0] ==
        "x.yaml: keys that have no meaning here are ignored: hydra, rpc_timeout, student.worker_cls, "
        "teacher.strategy_args.strategy_config.bf16, teacher.training_args.max_grad_norm, validation.data_args.tag, "
        "validation.generating_args");
}

TEST_CASE("sinks of other programs") {
  const ConfigFile file = parse(needed + "track_with: [wandb, csv, swanlab]\n");
  CHECK(file.config.track_with == std::vector<std::string>{"csv"});
  CHECK(file.warnings ==
        std::vector<std::string>{
            "x.yaml:6: track_with: wandb, swanlab is not available here and ignored: metrics go to [csv]"});
}

TEST_CASE("offloading is accepted with a warning") {
  const ConfigFile file = parse(needed + "is_offload_states: true\n");
  CHECK(file.warnings == std::vector<std::string>{
                             "x.yaml:6: is_offload_states: true has no effect yet: all states stay in device memory"});
}

TEST_CASE("other spellings of keys") {
  CHECK(read(needed + "  training_args: {max_grad_norm: 2}\n").max_grad_norm == 2);
  CHECK(read(needed + "  training_args: {max_grad_norm: 2}\nmax_grad_norm: 2\n").max_grad_norm == 2);
  CHECK(read(needed + "  training_args: {max_grad_norm: 1.0}\nmax_grad_norm: 1\n").max_grad_norm == 1);
  CHECK(read(needed + "  training_args: {max_grad_norm: ~}\nmax_grad_norm: 2\n").max_grad_norm == 2);
  CHECK(read(needed + "logits_transfer_backend: ipc+nccl\n").logits_transfer_backend == LogitsTransfer::shared_memory);
  CHECK(parse_config("logits_transfer_backend: nccl_only", "x.yaml", {}).config.logits_transfer_backend ==
        LogitsTransfer::network);
  const Config config =
      parse_config("teacher: {strategy_args: {strategy_config: {tp_size: 2, pp_size: 3}}}", "x", {}).config;
  CHECK(config.teacher.strategy_args.strategy_config.tensor_model_parallel_size == 2);
  CHECK(config.teacher.strategy_args.strategy_config.pipeline_model_parallel_size == 3);
  CHECK(
      refused(needed + "  training_args: {max_grad_norm: 1}\nmax_grad_norm: 2\n") ==
      "x.yaml:6: student.training_args.max_grad_norm is '1', but max_grad_norm is '2' (x.yaml:7): expected one of the "
      "two keys");
}

TEST_CASE("a key given twice") {
  CHECK(refused(needed + "seed: 1\nmax_steps: 2\nseed: 3\n") ==
        "x.yaml:8: key 'seed' is given twice: first at x.yaml:6");
  CHECK(refused("student:\n  data_args: {file_name: a,\n    file_name: b}\n") ==
        "x.yaml:3: key 'file_name' is given twice: first at x.yaml:2");
  CHECK(refused("hydra:\n  a: 1\n  a: 1\n") == "x.yaml:3: key 'a' is given twice: first at x.yaml:2");
}

TEST_CASE("anchors and merge keys") {
  const Config config = read(
      "student_pretrain: s\n"
      "teacher_pretrain: t\n"
      "student: &role\n"
      "  data_args: {file_name: d.json}\n"
      "  infer_batch_size: 3\n"
      "  training_args: &args {learning_rate: 1e-3, warmup_steps: 5}\n"
      "teacher:\n"
      "  <<: *role\n"
      "  infer_batch_size: 4\n"
      "  training_args:\n"
      "    <<: [{warmup_steps: 6}, *args]\n");
  CHECK(config.student.infer_batch_size == 3);
  CHECK(config.teacher.infer_batch_size == 4);  // what is written wins over what is merged
  CHECK(config.teacher.data_args.file_name == std::vector<std::string>{"d.json"});
  CHECK(config.teacher.training_args.warmup_steps == 6);  // the first of several wins
  CHECK(config.teacher.training_args.learning_rate == 1e-3);

  CHECK(refused("student: {<<: 5}\n") == "x.yaml:1: <<: expected a section or a list of sections, found '5'");
  CHECK(refused("a: &x {seed: q}\nteacher: {<<: [*x, y]}\n") ==
        "x.yaml:2: <<: expected a section or a list of sections, found 'y'");
}

TEST_CASE("what is no configuration") {
  CHECK(refused("a: [1\n") == "x.yaml:2: is not valid YAML: end of sequence flow not found");
  CHECK(refused("seed: 1\n  max_steps: 2\n") == "x.yaml:2: is not valid YAML: illegal map value");
  CHECK(refused("a: *b\n") == "x.yaml:1: is not valid YAML: the referenced anchor is not defined");
  CHECK(refused("just text") == "x.yaml: expected lines 'key: value', found 'just text'");
  CHECK(refused("- a\n- b\n") == "x.yaml: expected lines 'key: value', found a list");
  CHECK(refused("seed: 1\n---\nseed: 2\n") == "x.yaml: holds more than one YAML document: expected one");
  CHECK(refused("! ,") == "x.yaml: holds more than one YAML document: expected one");  // endless in yaml-cpp's LoadAll
  CHECK(refused("[a, b]: 1\n") == "x.yaml:1: has a key that is no plain name");
  CHECK(refused("exp_name: !!python/object:os.system x\n") ==
        "x.yaml:1: has the tag tag:yaml.org,2002:python/object:os.system: expected plain values");
  CHECK(refused("exp_name: !env HOME\n") == "x.yaml:1: has the tag !env: expected plain values");
  for (const char* bytes : {"a\xff", "\xc3", "\xed\xa0\x80", "\xef\xbf\xbe", "\xef\xb7\x90"}) {
    CHECK(refused(std::string("seed: 1\nexp_name: ") + bytes) ==
          "x.yaml:2: holds bytes that are no text: expected UTF-8");
    CHECK(refused(std::string("seed: 1\n") + bytes + ": 1\n") ==
          "x.yaml:2: holds bytes that are no text: expected UTF-8");
    setenv("DISTILL_TEST_BYTES", bytes, 1);
    CHECK(
        refused("exp_name: ${oc.env:DISTILL_TEST_BYTES}\n") ==
        "x.yaml:1: exp_name: the environment variable DISTILL_TEST_BYTES holds bytes that are no text: expected UTF-8");
  }
}

TEST_CASE("aliases cannot make a file endless") {
  std::string bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n";
  for (int i = 1; i < 9; ++i) {
    const std::string before = "*a" + std::to_string(i - 1);
    bomb += "a" + std::to_string(i) + ": &a" + std::to_string(i) + " [" + before;
    for (int k = 0; k < 9; ++k) bomb += ", " + before;
    bomb += "]\n";
  }
  CHECK_THAT(refused(bomb),
             Catch::Contains("is nested too deep or too large: expected at most 100 levels and 20000 values"));
  CHECK_THAT(refused("a: &a [*a]\n"), Catch::Contains("is nested too deep or too large"));
  CHECK_THAT(refused("a: " + std::string(300, '[') + std::string(300, ']')), Catch::Contains("is nested too deep"));
}

TEST_CASE("files that cannot be read") {
  const auto message = [](const std::string& path) -> std::string {
    try {
      read_config(path, {}, {});
    } catch (const Error& e) {
      CHECK(e.code() == ExitCode::bad_input);
      return e.what();
    }
    return "no error";
  };
  const std::string folder = DISTILL_BINARY_DIR;
  CHECK(message(folder + "/missing.yaml") == folder + "/missing.yaml: no such configuration file");
  CHECK(message(folder) == folder + ": is a folder: expected a configuration file");
  const std::string large = folder + "/config_file_test_large.yaml";
  std::ofstream(large) << std::string(2 << 20, '#');
  CHECK(message(large) == large + ": has 2097152 bytes: expected a configuration of at most 1048576");
  std::filesystem::remove(large);
  const std::string closed = folder + "/config_file_test_closed.yaml";
  std::ofstream(closed) << "seed: 1\n";
  {
    const test::Limit no_more_files(RLIMIT_NOFILE, 0);
    CHECK(message(closed) == closed + ": cannot be read");
  }
  std::filesystem::remove(closed);
}

TEST_CASE("overrides win over the file") {
  const std::string file = needed + "  training_args: {learning_rate: 1e-3, warmup_steps: 5}\nseed: 1\n";
  const Config config = read(file, {"seed=2", "student.training_args.learning_rate=1e-4", "teacher.infer_batch_size=3",
                                    "track_with=[csv]", "exp_name=a=b", "student.device_mapping=list(range(0,2))",
                                    "validation={data_args: {file_name: v.json}}", "max_steps=1", "max_steps=7"});
  CHECK(config.seed == 2);
  CHECK(config.student.training_args.learning_rate == 1e-4);
  CHECK(config.student.training_args.warmup_steps == 5);
  CHECK(config.teacher.infer_batch_size == 3);
  CHECK(config.exp_name == "a=b");
  CHECK(config.student.device_mapping == std::vector<int>{0, 1});
  CHECK(config.validation.data_args.file_name == std::vector<std::string>{"v.json"});
  CHECK(config.max_steps == 7);
  CHECK(read(file, {"seed=~"}).seed == 42);
  CHECK(read(file, {"seed="}).seed == 42);
  CHECK(read("seed: 3\nexp_name: run-${seed}\n" + needed, {"seed=4"}).exp_name == "run-4");
  CHECK(read(file, {"exp_name=run-${seed}"}).exp_name == "run-1");
  CHECK(read(file, {"student={infer_batch_size: 2}"}).student.training_args.warmup_steps == 5);
}

TEST_CASE("wrong overrides are named in place of a line") {
  CHECK(refused(needed, {"seed=x"}) == "command line 'seed=x': seed: expected an integer at least 0, found 'x'");
  CHECK(refused(needed, {"seed"}) == "command line 'seed': expected key=value");
  CHECK(refused(needed, {"=5"}) == "command line '=5': expected a dotted key before '=', found ''");
  CHECK(refused(needed, {"student..x=5"}) ==
        "command line 'student..x=5': expected a dotted key before '=', found 'student..x'");
  CHECK(refused(needed, {"seed.x=5"}) ==
        "command line 'seed.x=5': seed: expected an integer at least 0, found a section");
  CHECK(refused(needed + "seed: 1\n", {"seed.x=5"}) ==
        "command line 'seed.x=5': 'seed' is no section but '1' (x.yaml:6)");
  CHECK(refused(needed, {"track_with=[csv"}) ==
        "command line 'track_with=[csv': is not valid YAML: end of sequence flow not found");
  CHECK(refused(needed, {"teacher_pretrain=~"}) ==
        "x.yaml: teacher_pretrain: is missing: expected the Hugging Face folder of the teacher model (or "
        "teacher.model_args.model_name_or_path); distill_loss_weight: 0 needs no teacher");
}

TEST_CASE("rules between keys name the line of the key") {
  CHECK(refused("") ==
        "x.yaml: student_pretrain: is missing: expected the Hugging Face folder of the student model (or "
        "student.model_args.model_name_or_path)");
  CHECK(refused("student_pretrain: s\nteacher_pretrain: t\n") ==
        "x.yaml: student.data_args.file_name: is missing: expected the path of the training records");
  CHECK(refused(needed + "peer_timeout: 5s\n") ==
        "x.yaml:6: peer_timeout: is 5 s: expected at least peer_dead_after, 20 s");
  CHECK(read("student_pretrain: s\ndistill_loss_weight: 0\nstudent: {data_args: {file_name: d}}\n").teacher ==
        WorkerConfig());
}

TEST_CASE("a value whose feature is not there yet is an error where it is written") {
  struct Case {
    std::string line, message;
  };
  const auto wrong = GENERATE(values<Case>({
      {"device: cuda", "device: cuda is not built into this binary: expected auto or cpu"},
      {"profiler_timeline: true", "profiler_timeline: true is not yet supported: expected false"},
      {"teacher: {strategy_args: {strategy_config: {virtual_pipeline_model_parallel_size: 2}}}",
       "teacher.strategy_args.strategy_config.virtual_pipeline_model_parallel_size: more than 1 is not yet supported: "
       "expected 1"},
      {"teacher: {strategy_args: {strategy_config: {context_parallel_size: 2}}}",
       "teacher.strategy_args.strategy_config.context_parallel_size: more than 1 is not yet supported: expected 1"},
  }));
  CHECK(refused(needed + wrong.line + "\n") == "x.yaml:6: " + wrong.message);
}

TEST_CASE("student rows of what is not there yet") {
  CHECK(refused(needed, {"student.strategy_args.strategy_config.context_parallel_size=2"}) ==
        "command line 'student.strategy_args.strategy_config.context_parallel_size=2': "
        "student.strategy_args.strategy_config.context_parallel_size: more than 1 is not yet supported: expected 1");
}

TEST_CASE("values that are there are accepted when written") {
  CHECK(parse(needed + "device: cuda\n", {}, {.cuda = true}).config.device == DeviceChoice::cuda);
  const Config config =
      read(needed + "device: cpu\nteacher_payload: logits\nprofiler_timeline: false\ntrack_with: [hdf5]\n" +
           "eval_steps: 5\nmax_ckpt_to_keep: 3\nvalidation: {data_args: {file_name: v}}\n");
  CHECK(config.max_ckpt_to_keep == 3);
}

TEST_CASE("the resolved file reads back to the same configuration, all keys included") {
  const Config config = read(needed + "seed: 7\nexp_name: mine\n");
  const std::string resolved = to_yaml(config);
  const ConfigFile again = parse_config(resolved, "elsewhere/config.yaml", {});
  check_config(again, {});
  CHECK(again.config == config);
  CHECK(again.warnings.empty());
  CHECK(to_yaml(again.config) == resolved);
  for (const std::string& key : all_keys()) {
    std::string last = key.substr(key.rfind('.') + 1);
    CHECK_THAT(resolved, Catch::Contains(last + ": "));
  }
}

TEST_CASE("random configurations survive writing and reading") {
  const auto seed = GENERATE(range(0, 200));
  Randomizer randomizer(static_cast<std::uint64_t>(seed));
  Config config;
  Config::visit(config, randomizer);
  fill_defaults(config, "unused");
  const std::string resolved = to_yaml(config);
  INFO(resolved);
  CHECK(parse_config(resolved, "config.yaml", {}).config == config);
}

TEST_CASE("the help has a line for each key with its default, range and meaning") {
  const std::string help = config_help();
  const std::vector<std::string> keys = all_keys();
  CHECK(std::count(help.begin(), help.end(), '\n') == static_cast<std::ptrdiff_t>(keys.size()));
  for (const std::string& key : keys) CHECK_THAT("\n" + help, Catch::Contains("\n" + key + " "));
  std::istringstream lines(help);
  std::string line;
  while (std::getline(lines, line) && !line.starts_with("distill_loss_weight ")) continue;
  CHECK_THAT(line, Catch::Matches("distill_loss_weight +0\\.5 +a number at least 0 and at most 1 +share of .*"));
}

TEST_CASE("what is wrong with the file that a value points to is told with the key and its place") {
  const ConfigFile file = parse_config("exp_name: x\nstudent_pretrain: folder\n", "x.yaml", {});
  const auto of = [&](std::string_view key, const Error& error) {
    try {
      file.reading(key, [&] { throw error; });
    } catch (const Error& seen) {
      return text(int(seen.code()), ' ', seen.what());
    }
    return std::string();
  };
  CHECK(of("student_pretrain", {ExitCode::bad_input, "folder: no such folder"}) ==
        "2 x.yaml:2: student_pretrain: folder: no such folder");
  CHECK(of("teacher_pretrain", {ExitCode::bad_input, "no"}) == "2 x.yaml: teacher_pretrain: no");
  CHECK(of("student_pretrain", {ExitCode::internal, "disk broken"}) == "1 disk broken");
}

TEST_CASE(
    "what the teacher's section says of data and training is ignored with a word, unless the student's says the same") {
  const auto warnings = [](const std::string& teacher, const std::string& rest = "") {
    std::string all;
    const std::string student =
        "student_pretrain: s\nstudent: {data_args: {file_name: d}, training_args: {learning_rate: 1e-3}}\n";
    for (const std::string& line : parse_config(student + "teacher: " + teacher + "\n" + rest, "x.yaml", {}).warnings)
      all += line;
    return all;
  };
  const std::string ignored = "x.yaml: ignored, because the student's values hold for both roles: teacher.";
  CHECK(warnings("~") == "");
  CHECK(warnings("{data_args: {file_name: d, template: native}, training_args: {learning_rate: 0.001}}") == "");
  CHECK(warnings("{model_args: {dtype: fp32}, device_mapping: [0]}") == "");
  CHECK(warnings("{infer_batch_size: 3}") == ignored + "infer_batch_size");
  CHECK(warnings("{use_sequence_packing: false}") == ignored + "use_sequence_packing");
  CHECK(warnings("{data_args: {template: chatml, shuffle: false, skip_bad_records: true}, training_args: "
                 "{learning_rate: 1e-4, warmup_steps: 3}}") ==
        ignored +
            "data_args.shuffle, teacher.data_args.skip_bad_records, teacher.data_args.template, "
            "teacher.training_args.learning_rate, teacher.training_args.warmup_steps");
  CHECK(warnings("{infer_batch_size: 3}", "distill_loss_weight: 0\n") == "");
  CHECK(warnings("{training_args: {learning_rate: 5e-5}}") == "");  // the default, as resolved files have it
}
