// The configuration of a run as plain structs. A key is declared once, in the `visit` of its struct, with its rule and
// its meaning: reading, writing, help and tests are visitors (io/config_file.h). Field names are the keys of the YAML
// file.
//
// A visitor is called as v(key, field, rule, meaning) for a value and v.section(key, struct) for a section.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/distill/loss_spec.h"
#include "core/model/spec.h"
#include "core/number.h"
#include "core/optim/schedule.h"
#include "core/train/outlier.h"

namespace distill {

using Seconds = std::chrono::duration<double>;

// --- what a value may be

// Numbers: an interval, closed unless it says otherwise. Strings: the allowed values; none listed allows all.
struct Rule {
  double low = -std::numeric_limits<double>::infinity(), high = std::numeric_limits<double>::infinity();
  bool excludes_low = false, excludes_high = false;
  std::span<const std::string_view> names = {};
};
inline constexpr Rule anything{};
inline constexpr Rule not_negative{.low = 0};
inline constexpr Rule positive{.low = 0, .excludes_low = true};
inline constexpr Rule fraction{.low = 0, .high = 1};                                                  // [0, 1]
inline constexpr Rule inside_unit{.low = 0, .high = 1, .excludes_low = true, .excludes_high = true};  // (0, 1)
inline constexpr Rule below_one{.low = 0, .high = 1, .excludes_high = true};                          // [0, 1)
constexpr Rule at_least(double low) { return {.low = low}; }
constexpr Rule one_of(std::span<const std::string_view> names) { return {.names = names}; }

// How the values of an enumeration are written. The first name of a value is the one that is printed.
template <class E>
struct Choice {
  std::string_view name;
  E value;
};
template <class E, std::size_t n>
constexpr std::array<Choice<E>, n> numbered(const std::array<std::string_view, n>& names) {
  std::array<Choice<E>, n> choices{};
  for (std::size_t i = 0; i < n; ++i) choices[i] = {names[i], static_cast<E>(i)};
  return choices;
}
template <class E>
inline constexpr std::array<Choice<E>, 0> choices{};

template <>
inline constexpr auto choices<DType> =
    std::array<Choice<DType>, 3>{{{"bf16", DType::bf16}, {"fp16", DType::f16}, {"fp32", DType::f32}}};
template <>
inline constexpr auto choices<Objective> = numbered<Objective>(objective_names);
template <>
inline constexpr auto choices<TopkMode> = numbered<TopkMode>(topk_mode_names);

enum class TeacherPayload { automatic, logits, hidden };
template <>
inline constexpr auto choices<TeacherPayload> = std::array<Choice<TeacherPayload>, 3>{
    {{"auto", TeacherPayload::automatic}, {"logits", TeacherPayload::logits}, {"hidden", TeacherPayload::hidden}}};

enum class LogitsTransfer { shared_memory, network };
template <>
inline constexpr auto choices<LogitsTransfer> =
    std::array<Choice<LogitsTransfer>, 3>{{{"ipc+nccl", LogitsTransfer::shared_memory},
                                           {"nccl-only", LogitsTransfer::network},
                                           {"nccl_only", LogitsTransfer::network}}};

enum class DeviceChoice { automatic, cpu, cuda };
template <>
inline constexpr auto choices<DeviceChoice> = std::array<Choice<DeviceChoice>, 3>{
    {{"auto", DeviceChoice::automatic}, {"cpu", DeviceChoice::cpu}, {"cuda", DeviceChoice::cuda}}};

enum class AttentionHint { automatic, sdpa, fa2 };
template <>
inline constexpr auto choices<AttentionHint> = std::array<Choice<AttentionHint>, 3>{
    {{"auto", AttentionHint::automatic}, {"sdpa", AttentionHint::sdpa}, {"fa2", AttentionHint::fa2}}};

template <>
inline constexpr auto choices<Recompute> =
    std::array<Choice<Recompute>, 2>{{{"full", Recompute::full}, {"selective", Recompute::selective}}};

template <>
inline constexpr auto choices<OutlierAction> = numbered<OutlierAction>(outlier_action_names);

enum class PackingAlgorithm { none, load_balance };
template <>
inline constexpr auto choices<PackingAlgorithm> = std::array<Choice<PackingAlgorithm>, 2>{
    {{"none", PackingAlgorithm::none}, {"load_balance", PackingAlgorithm::load_balance}}};

inline constexpr std::array<std::string_view, 1> model_types = {"causal_lm"};
inline constexpr std::array<std::string_view, 1> checkpoint_types = {"file_system"};
inline constexpr std::array<std::string_view, 6> chat_template_names = {"native", "qwen2_5", "qwen3",
                                                                        "chatml", "llama3",  "empty"};
inline constexpr std::array<std::string_view, 3> metric_sink_names = {"csv", "hdf5", "tensorboard"};
inline constexpr auto schedule_names = [] {
  std::array<std::string_view, schedules::all.size()> names{};
  for (std::size_t i = 0; i < names.size(); ++i) names[i] = schedules::all[i].name;
  return names;
}();

// A value, or "auto": measured or chosen at start.
template <class T>
struct AutoOr {
  std::optional<T> value;
  bool operator==(const AutoOr&) const = default;
};

// false, true (the newest complete checkpoint of this run) or the path of one.
struct Resume {
  bool wanted = false;
  std::string path;  // empty: the newest
  bool operator==(const Resume&) const = default;
};

// --- the sections

struct ModelArgs {
  std::string model_name_or_path;  // resolved: never empty where the model is needed
  DType dtype = DType::bf16;
  std::optional<std::string> model_type;
  AttentionHint attn_implementation = AttentionHint::automatic;
  bool disable_gradient_checkpointing = false;
  bool operator==(const ModelArgs&) const = default;

  template <class Self, class V>
  static void visit(Self& s, V& v) {
    v("model_name_or_path", s.model_name_or_path, anything,
      "Hugging Face model folder; wins over student_pretrain or teacher_pretrain");
    v("dtype", s.dtype, anything, "parameters and activations; the optimiser keeps fp32 masters");
    v("model_type", s.model_type, one_of(model_types), "what kind of model; there is one kind");
    v("attn_implementation", s.attn_implementation, anything,
      "a hint for GPUs: sdpa is the attention of cuDNN where it can be used, all else is our own");
    v("disable_gradient_checkpointing", s.disable_gradient_checkpointing, anything,
      "false: activations are recomputed in the backward");
  }
};

struct DataArgs {
  std::vector<std::string> file_name;
  bool shuffle = true;
  bool skip_bad_records = false;
  std::string template_name = "native";  // key: template
  bool operator==(const DataArgs&) const = default;

  template <class Self, class V>
  static void visit(Self& s, V& v) {
    v("file_name", s.file_name, anything, "one path or a list; JSON array or JSON lines");
    v("shuffle", s.shuffle, anything, "false: file order");
    v("skip_bad_records", s.skip_bad_records, anything, "true: bad records are counted and left out");
    v("template", s.template_name, one_of(chat_template_names), "chat template; native: the tokenizer's own");
  }
};

struct TrainingArgs {
  int num_train_epochs = 1;
  double learning_rate = 5e-5;
  std::string lr_scheduler_type = "linear";
  std::int64_t warmup_steps = 0;
  double warmup_ratio = 0;
  double weight_decay = 0;
  double adam_beta1 = 0.9, adam_beta2 = 0.999, adam_epsilon = 1e-8;
  int per_device_train_batch_size = 8;
  int gradient_accumulation_steps = 1;
  bool operator==(const TrainingArgs&) const = default;

  template <class Self, class V>
  static void visit(Self& s, V& v) {
    v("num_train_epochs", s.num_train_epochs, at_least(1), "passes over the data, unless max_steps is given");
    v("learning_rate", s.learning_rate, not_negative, "peak of the schedule");
    v("lr_scheduler_type", s.lr_scheduler_type, one_of(schedule_names), "as in Hugging Face transformers");
    v("warmup_steps", s.warmup_steps, not_negative, "updates of linear warm-up; wins over warmup_ratio");
    v("warmup_ratio", s.warmup_ratio, fraction, "share of all updates that is warm-up");
    v("weight_decay", s.weight_decay, not_negative, "decoupled, as AdamW; not for norms and biases");
    v("adam_beta1", s.adam_beta1, below_one, "decay of the first moment");
    v("adam_beta2", s.adam_beta2, below_one, "decay of the second moment");
    v("adam_epsilon", s.adam_epsilon, positive, "added to the root of the second moment");
    v("per_device_train_batch_size", s.per_device_train_batch_size, at_least(1),
      "sequences per micro-batch per data-parallel rank");
    v("gradient_accumulation_steps", s.gradient_accumulation_steps, at_least(1),
      "micro-batches per step per data-parallel rank");
  }
};

struct StrategyConfig {
  int tensor_model_parallel_size = 1;
  int pipeline_model_parallel_size = 1;
  int virtual_pipeline_model_parallel_size = 1;
  int context_parallel_size = 1;
  bool sequence_parallel = false;
  bool use_distributed_optimizer = true;
  std::optional<Recompute> recompute_granularity;
  bool overlap_grad_reduce = true;
  bool operator==(const StrategyConfig&) const = default;

  template <class Self, class V>
  static void visit(Self& s, V& v) {
    v("tensor_model_parallel_size", s.tensor_model_parallel_size, at_least(1), "also written tp_size");
    v("pipeline_model_parallel_size", s.pipeline_model_parallel_size, at_least(1), "also written pp_size");
    v("virtual_pipeline_model_parallel_size", s.virtual_pipeline_model_parallel_size, at_least(1),
      "chunks of layers per pipeline stage");
    v("context_parallel_size", s.context_parallel_size, at_least(1), "ranks that share a sequence");
    v("sequence_parallel", s.sequence_parallel, anything, "cut tokens over the tensor-parallel group");
    v("use_distributed_optimizer", s.use_distributed_optimizer, anything, "AdamW state cut over data-parallel ranks");
    v("recompute_granularity", s.recompute_granularity, anything, "~: full, unless checkpointing is disabled");
    v("overlap_grad_reduce", s.overlap_grad_reduce, anything, "reduce gradients while the backward runs");
  }
};

struct StrategyArgs {
  std::string strategy_name;
  StrategyConfig strategy_config;
  bool operator==(const StrategyArgs&) const = default;

  template <class Self, class V>
  static void visit(Self& s, V& v) {
    v("strategy_name", s.strategy_name, anything, "any established name (megatron_train ...); one strategy serves all");
    v.section("strategy_config", s.strategy_config);
  }
};

struct SequencePackingArgs {
  PackingAlgorithm algorithm = PackingAlgorithm::none;
  bool operator==(const SequencePackingArgs&) const = default;

  template <class Self, class V>
  static void visit(Self& s, V& v) {
    v("algorithm", s.algorithm, anything,
      "load_balance: the sequences of a step are spread so that data-parallel ranks have the same work");
  }
};

// One role: student or teacher. Only the student's data counts; both roles read the same records.
struct WorkerConfig {
  ModelArgs model_args;
  DataArgs data_args;
  TrainingArgs training_args;
  int infer_batch_size = 16;
  StrategyArgs strategy_args;
  bool use_sequence_packing = true;
  SequencePackingArgs sequence_packing_args;
  std::vector<int> device_mapping;  // empty: not given
  std::optional<double> gpu_memory_utilization;
  bool operator==(const WorkerConfig&) const = default;

  template <class Self, class V>
  static void visit(Self& s, V& v) {
    v.section("model_args", s.model_args);
    v.section("data_args", s.data_args);
    v.section("training_args", s.training_args);
    v("infer_batch_size", s.infer_batch_size, at_least(1), "sequences per forward in validation");
    v.section("strategy_args", s.strategy_args);
    v("use_sequence_packing", s.use_sequence_packing, anything,
      "true: sequences are packed; false: padded to the longest of the micro-batch (same numbers)");
    v.section("sequence_packing_args", s.sequence_packing_args);
    v("device_mapping", s.device_mapping, not_negative,
      "GPUs of the role, e.g. [0, 1] or list(range(0,8)); as many ranks; ~: half of the world");
    v("gpu_memory_utilization", s.gpu_memory_utilization, fraction, "accepted, ignored");
  }
};

struct ValidationDataArgs {
  std::vector<std::string> file_name;
  std::string template_name;  // key: template; resolved: the student's where not given
  bool operator==(const ValidationDataArgs&) const = default;

  template <class Self, class V>
  static void visit(Self& s, V& v) {
    v("file_name", s.file_name, anything, "held-out records; ~: no validation");
    v("template", s.template_name, one_of(chat_template_names), "~: the student's");
  }
};

struct ValidationConfig {
  ValidationDataArgs data_args;
  bool operator==(const ValidationConfig&) const = default;

  template <class Self, class V>
  static void visit(Self& s, V& v) {
    v.section("data_args", s.data_args);
  }
};

struct CheckpointConfig {
  std::string type = "file_system";
  std::string output_dir;  // resolved: output_dir of the run where not given
  bool operator==(const CheckpointConfig&) const = default;

  template <class Self, class V>
  static void visit(Self& s, V& v) {
    v("type", s.type, one_of(checkpoint_types), "where checkpoints are kept");
    v("output_dir", s.output_dir, anything, "root of the checkpoints; ~: output_dir");
  }
};

struct Config {
  std::string exp_name;  // resolved: never empty
  std::int64_t seed = 42;
  std::string output_dir = "./output";
  std::string logging_dir = "./output/logs";
  CheckpointConfig checkpoint_config;
  std::int64_t max_steps = -1;
  std::int64_t save_steps = 50, logging_steps = 1, eval_steps = 10;
  int max_ckpt_to_keep = 0;
  Resume resume_from_checkpoint;
  std::string student_pretrain, teacher_pretrain;
  std::string question_key = "question", answer_key = "answer";
  std::string prompt_key, system_key;  // empty: records have none
  int sequence_length = 2048;
  bool distill_on_prompt = false;
  double distill_loss_weight = 0.5;
  double kd_temperature = 1, teacher_temperature = 1;
  Objective kd_objective = Objective::forward_kl;
  double adaptive_kl_alpha = 0.5, skew_lambda = 0.1;
  int logits_topk = 0;
  TopkMode logits_topk_mode = TopkMode::renormalize;
  TeacherPayload teacher_payload = TeacherPayload::automatic;
  LogitsTransfer logits_transfer_backend = LogitsTransfer::shared_memory;
  double max_grad_norm = 0;
  ValidationConfig validation;
  bool is_offload_states = false;
  DeviceChoice device = DeviceChoice::automatic;
  std::vector<std::string> track_with = {"csv", "hdf5", "tensorboard"};
  AutoOr<int> logits_chunk;
  int logits_ring_slots = 4;
  Seconds peer_dead_after{20}, peer_timeout{600};
  std::optional<Seconds> max_time;
  int max_nonfinite_steps = 5;
  OutlierAction outlier_action = OutlierAction::off;
  int outlier_window = 100;
  double outlier_zscore = 6;
  AutoOr<double> peak_flops;
  bool profiler_timeline = false;
  WorkerConfig student, teacher;
  bool operator==(const Config&) const = default;

  bool needs_teacher() const { return distill_loss_weight > 0; }
  std::filesystem::path run_dir() const { return std::filesystem::path(output_dir) / exp_name; }
  std::filesystem::path log_dir() const { return std::filesystem::path(logging_dir) / exp_name; }
  std::filesystem::path checkpoint_dir() const {
    return std::filesystem::path(checkpoint_config.output_dir) / exp_name / "checkpoints";
  }

  template <class Self, class V>
  static void visit(Self& s, V& v) {
    v("exp_name", s.exp_name, anything, "name of the run, part of output and log paths; ~: name of the file");
    v("seed", s.seed, not_negative, "data order, and weights where they are random");
    v("output_dir", s.output_dir, anything, "root of what runs write; exp_name is appended");
    v("logging_dir", s.logging_dir, anything, "root of logs and metrics; exp_name is appended");
    v.section("checkpoint_config", s.checkpoint_config);
    v("max_steps", s.max_steps, at_least(-1), "above 0: overrides num_train_epochs");
    v("save_steps", s.save_steps, not_negative, "steps between checkpoints; 0: only the final one");
    v("logging_steps", s.logging_steps, not_negative,
      "steps between lines of metrics; 0: only of the last step, validations and skipped steps");
    v("eval_steps", s.eval_steps, not_negative, "steps between validations; 0: only at the end");
    v("max_ckpt_to_keep", s.max_ckpt_to_keep, not_negative,
      "newest checkpoints that are kept, beside the best one; 0: all");
    v("resume_from_checkpoint", s.resume_from_checkpoint, anything,
      "true: the newest complete checkpoint of this run; or its path");
    v("student_pretrain", s.student_pretrain, anything, "Hugging Face model folder of the student");
    v("teacher_pretrain", s.teacher_pretrain, anything, "Hugging Face model folder of the teacher");
    v("question_key", s.question_key, anything, "field of a record: what the user says");
    v("answer_key", s.answer_key, anything, "field of a record: what the assistant answers");
    v("prompt_key", s.prompt_key, anything, "field of a record: put before the question");
    v("system_key", s.system_key, anything, "field of a record: system message");
    v("sequence_length", s.sequence_length, at_least(2), "longest sequence in tokens; longer ones are truncated");
    v("distill_on_prompt", s.distill_on_prompt, anything, "true: prompt tokens are supervised too");
    v("distill_loss_weight", s.distill_loss_weight, fraction,
      "share of the distillation term; 0: plain fine-tuning without a teacher");
    v("kd_temperature", s.kd_temperature, positive, "divides the logits of both sides");
    v("teacher_temperature", s.teacher_temperature, positive, "divides the teacher's logits in addition");
    v("kd_objective", s.kd_objective, anything, "distance between teacher and student");
    v("adaptive_kl_alpha", s.adaptive_kl_alpha, inside_unit, "adaptive_kl: teacher's mass that counts as tail");
    v("skew_lambda", s.skew_lambda, inside_unit, "skewed objectives: share of the other side in the mixture");
    v("logits_topk", s.logits_topk, not_negative, "teacher's largest entries that count; 0: whole vocabulary");
    v("logits_topk_mode", s.logits_topk_mode, anything,
      "both sides renormalised over the top entries, or one bucket for the rest");
    v("teacher_payload", s.teacher_payload, anything, "what travels from teacher to student");
    v("logits_transfer_backend", s.logits_transfer_backend, anything, "how it travels within a node");
    v("max_grad_norm", s.max_grad_norm, not_negative,
      "0: no clipping; also accepted as student.training_args.max_grad_norm");
    v.section("validation", s.validation);
    v("is_offload_states", s.is_offload_states, anything, "accepted with a warning");
    v("device", s.device, anything, "where the work is done");
    v("track_with", s.track_with, anything, "where metrics go: csv, hdf5, tensorboard");
    v("logits_chunk", s.logits_chunk, at_least(1), "positions per ring slot");
    v("logits_ring_slots", s.logits_ring_slots, at_least(1), "chunks the teacher may be ahead");
    v("peer_dead_after", s.peer_dead_after, positive, "silence of another rank that counts as its end");
    v("peer_timeout", s.peer_timeout, positive,
      "longest wait for a rank that is alive; teachers wait as long as students live");
    v("max_time", s.max_time, positive, "wall-clock limit, e.g. 3h55m: save and leave with exit code 85");
    v("max_nonfinite_steps", s.max_nonfinite_steps, at_least(1),
      "steps in a row without finite numbers that end a run; skipped outliers count");
    v("outlier_action", s.outlier_action, anything,
      "when a loss or gradient norm is far above those before; stop: save what was before and leave with exit code 4");
    v("outlier_window", s.outlier_window, at_least(2), "steps that an outlier is judged by, and that come before any");
    v("outlier_zscore", s.outlier_zscore, positive, "standard deviations above their mean that make an outlier");
    v("peak_flops", s.peak_flops, positive, "floating-point operations per second of a rank, for MFU; auto: measured");
    v("profiler_timeline", s.profiler_timeline, anything, "write a trace of a few steps");
    v.section("student", s.student);
    v.section("teacher", s.teacher);
  }
};

// --- rules between fields

// What this binary can do beyond the portable part.
struct Capabilities {
  bool cuda = false;
};

// Something wrong with the value of a key; the reader of the file adds where it was written.
struct ConfigProblem {
  std::string key, message;
};

// Fills in what depends on other keys. `file_name` is the default of exp_name.
void fill_defaults(Config& config, std::string_view file_name);

// Rules between keys of a config with defaults filled in.
std::vector<ConfigProblem> rule_violations(const Config& config);

// Values whose feature this binary lacks. An error only where the key was written.
std::vector<ConfigProblem> not_supported(const Config& config, const Capabilities& capabilities);

}  // namespace distill
