#include "core/config.h"

#include <algorithm>
#include <array>
#include <set>

#include "core/error.h"

namespace distill {

namespace {

constexpr std::string_view strategy_config = "strategy_args.strategy_config.";

std::string key_of(std::string_view role, std::string_view key) { return text(role, ".", key); }

void check_model(const Config& config, std::string_view role, std::vector<ConfigProblem>& problems) {
  const WorkerConfig& worker = role == "student" ? config.student : config.teacher;
  if (worker.model_args.model_name_or_path.empty())
    problems.push_back(
        {text(role, "_pretrain"), text("is missing: expected the Hugging Face folder of the ", role, " model (or ",
                                       key_of(role, "model_args.model_name_or_path"), ")",
                                       role == "teacher" ? "; distill_loss_weight: 0 needs no teacher" : "")});
}

void check_devices(const WorkerConfig& worker, std::string_view role, std::vector<ConfigProblem>& problems) {
  const std::vector<int>& devices = worker.device_mapping;
  if (devices.empty()) return;
  const std::set<int> distinct(devices.begin(), devices.end());
  if (distinct.size() != devices.size())
    problems.push_back({key_of(role, "device_mapping"), "names a device twice: expected distinct devices"});
  const StrategyConfig& strategy = worker.strategy_args.strategy_config;
  const std::int64_t model_ranks = std::int64_t{strategy.tensor_model_parallel_size} *
                                   strategy.pipeline_model_parallel_size * strategy.context_parallel_size;
  if (std::int64_t(devices.size()) % model_ranks != 0)
    problems.push_back(
        {key_of(role, "device_mapping"), text("has ", devices.size(), " devices: expected a multiple of ", model_ranks,
                                              " (tensor × pipeline × context parallel size)")});
}

void check_roles_agree(const Config& config, std::vector<ConfigProblem>& problems) {
  const StrategyConfig& student = config.student.strategy_args.strategy_config;
  const StrategyConfig& teacher = config.teacher.strategy_args.strategy_config;
  const auto require_equal = [&](std::string_view key, int ours, int theirs) {
    if (ours != theirs)
      problems.push_back({key_of("teacher", text(strategy_config, key)),
                          text("is ", theirs, ": expected ", ours, ", the same as the student's")});
  };
  require_equal("tensor_model_parallel_size", student.tensor_model_parallel_size, teacher.tensor_model_parallel_size);
  require_equal("pipeline_model_parallel_size", student.pipeline_model_parallel_size,
                teacher.pipeline_model_parallel_size);
  const std::size_t ours = config.student.device_mapping.size(), theirs = config.teacher.device_mapping.size();
  if (ours != 0 && theirs != 0 && ours != theirs)
    problems.push_back(
        {"teacher.device_mapping", text("has ", theirs, " devices: expected ", ours,
                                        ", as many as the student has (a teacher rank per student rank)")});
}

// A value whose feature is declared but not there yet, of the whole run or of a role (its key is without the role).
struct Lacking {
  using InRun = bool (*)(const Config&, const Capabilities&);
  using InRole = bool (*)(const StrategyConfig&, const WorkerConfig&);

  std::string_view key, message;
  InRun in_run = nullptr;
  InRole in_role = nullptr;

  constexpr Lacking(std::string_view k, std::string_view m, InRun is_wanted) : key(k), message(m), in_run(is_wanted) {}
  constexpr Lacking(std::string_view k, std::string_view m, InRole is_wanted)
      : key(k), message(m), in_role(is_wanted) {}
};

// Delete a row when its feature lands.
constexpr auto lacking = std::to_array<Lacking>({
    {"device", "cuda is not built into this binary: expected auto or cpu",
     [](const Config& c, const Capabilities& can) { return c.device == DeviceChoice::cuda && !can.cuda; }},
    {"profiler_timeline", "true is not yet supported: expected false",
     [](const Config& c, const Capabilities&) { return c.profiler_timeline; }},
    {"strategy_args.strategy_config.virtual_pipeline_model_parallel_size",
     "more than 1 is not yet supported: expected 1",
     [](const StrategyConfig& s, const WorkerConfig&) { return s.virtual_pipeline_model_parallel_size > 1; }},
    {"strategy_args.strategy_config.context_parallel_size", "more than 1 is not yet supported: expected 1",
     [](const StrategyConfig& s, const WorkerConfig&) { return s.context_parallel_size > 1; }},
});

}  // namespace

void fill_defaults(Config& config, std::string_view file_name) {
  if (config.exp_name.empty()) config.exp_name = file_name;
  if (config.checkpoint_config.output_dir.empty()) config.checkpoint_config.output_dir = config.output_dir;
  ModelArgs& student = config.student.model_args;
  if (student.model_name_or_path.empty()) student.model_name_or_path = config.student_pretrain;
  ModelArgs& teacher = config.teacher.model_args;
  if (teacher.model_name_or_path.empty()) teacher.model_name_or_path = config.teacher_pretrain;
  std::string& validation_template = config.validation.data_args.template_name;
  if (validation_template.empty()) validation_template = config.student.data_args.template_name;
}

std::vector<ConfigProblem> rule_violations(const Config& config) {
  std::vector<ConfigProblem> problems;
  check_model(config, "student", problems);
  if (config.student.data_args.file_name.empty())
    problems.push_back({"student.data_args.file_name", "is missing: expected the path of the training records"});
  check_devices(config.student, "student", problems);
  if (config.needs_teacher()) {
    check_model(config, "teacher", problems);
    check_devices(config.teacher, "teacher", problems);
    check_roles_agree(config, problems);
  }
  const std::filesystem::path name = config.exp_name, plain = name.lexically_normal();
  if (name.is_absolute() || std::find(name.begin(), name.end(), "..") != name.end() || plain == "." || plain == "./")
    problems.push_back({"exp_name", text("is '", config.exp_name, "': expected a name that stays within output_dir")});
  if (config.peer_timeout < config.peer_dead_after)
    problems.push_back(
        {"peer_timeout", text("is ", config.peer_timeout.count(), " s: expected at least peer_dead_after, ",
                              config.peer_dead_after.count(), " s")});
  return problems;
}

std::vector<ConfigProblem> not_supported(const Config& config, const Capabilities& capabilities) {
  std::vector<ConfigProblem> problems;
  const auto check_role = [&](const Lacking& row, std::string_view role, const WorkerConfig& worker) {
    if (row.in_role(worker.strategy_args.strategy_config, worker))
      problems.push_back({key_of(role, row.key), std::string(row.message)});
  };
  for (const Lacking& row : lacking) {
    if (row.in_run && row.in_run(config, capabilities))
      problems.push_back({std::string(row.key), std::string(row.message)});
    if (row.in_role) check_role(row, "student", config.student);
    if (row.in_role && config.needs_teacher()) check_role(row, "teacher", config.teacher);
  }
  return problems;
}

}  // namespace distill
