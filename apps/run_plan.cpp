#include "apps/run_plan.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>

#include "apps/grid_advice.h"
#include "core/distill/head_loss.h"
#include "core/model/params.h"
#include "io/model_folder.h"
#include "io/tokenizer.h"

namespace distill {

namespace {

namespace fs = std::filesystem;

template <class... Value>
std::string format(const char* pattern, Value... value) {
  char line[400];
  std::snprintf(line, sizeof line, pattern, value...);
  return line;
}

// Student and teacher must give every text the same ids: one data set, one vocabulary.
void check_same_tokenizer(const Tokenizer& student, const std::string& student_folder,
                          const std::string& teacher_folder) {
  const Tokenizer teacher = Tokenizer::load(teacher_folder);
  if (const std::string difference = first_difference(student, teacher); !difference.empty())
    fail_input(teacher_folder, ": the teacher's tokenizer differs from the student's (", student_folder,
               "): ", difference,
               "; distillation compares the two models token by token, so both need the same tokenizer");
}

void check_vocabulary(const ModelSpec& spec, const std::string& folder, std::int64_t vocabulary) {
  check_input(spec.vocabulary >= vocabulary, folder, "/config.json: vocab_size is ", spec.vocabulary,
              ": expected at least ", vocabulary, ", the number of ids that ", folder, "/tokenizer.json can produce");
}

bool balances(const WorkerConfig& worker) {
  return worker.sequence_packing_args.algorithm == PackingAlgorithm::load_balance;
}

// The key that chose a role's model folder.
std::string model_key(const ConfigFile& file, std::string_view role) {
  const std::string of_role = text(role, ".model_args.model_name_or_path");
  return file.written.contains(of_role) ? of_role : text(role, "_pretrain");
}

// What a token costs beside attention, in pairs of tokens: 2 FLOP a parameter there, 4 a layer and column for each of
// length² / 2 pairs here.
SequenceWork sequence_work(const ModelSpec& spec) {
  return {.per_token = std::int64_t(param_table(spec).count()) / (std::int64_t(spec.layers) * spec.q_cols())};
}

DataPlan data_plan(const RunPlan& plan, int dp_rank) {
  const WorkerConfig& worker = plan.config.student;
  return {.shape = {.per_device = worker.training_args.per_device_train_batch_size,
                    .accumulation = worker.training_args.gradient_accumulation_steps,
                    .dp_size = plan.grid.sizes.dp},
          .dp_rank = dp_rank,
          .layout = worker.use_sequence_packing ? Layout::packed : Layout::padded,
          .row_multiple = plan.cuts_tokens ? plan.grid.sizes.tp : 1,
          .last = LastBatch::drop,
          .seed = std::uint64_t(plan.config.seed),
          .shuffle = worker.data_args.shuffle,
          .balance = balances(worker) && worker.use_sequence_packing ? std::optional(sequence_work(plan.student))
                                                                     : std::nullopt};
}

// The sizes that were asked for must fit the models; what does not is said with the grids that do.
void check_sizes_fit(const ConfigFile& file, const GridQuestion& question) {
  for (const ModelSpec& model : question.models) {
    const auto found = misfit(model, question.tp, question.pp);
    if (!found) continue;
    const std::string key = text("student.strategy_args.strategy_config.", found->key);
    fail_input(file.where(key), ": ", key, ": the ", &model == &question.models.front() ? "student" : "teacher", "'s ",
               found->problem, "; ", grid_advice(question));
  }
}

// Fails now where the run could not write later: the nearest folder that exists must let us make others in it.
void check_can_write(const ConfigFile& file, std::string_view key, const fs::path& folder) {
  std::error_code ignored;
  fs::path nearest = fs::absolute(folder);
  while (nearest.has_relative_path() && !fs::exists(nearest, ignored)) nearest = nearest.parent_path();
  const bool is_folder = fs::is_directory(nearest, ignored);
  const bool is_writable = is_folder && access(nearest.c_str(), W_OK | X_OK) == 0;
  const std::string reason = is_folder ? text(": ", std::strerror(errno)) : " is not a folder";
  check_input(is_writable, file.where(key), ": ", key, ": cannot write to ", folder.string(), ": ", nearest.string(),
              reason);
}

void check_run_folders(const ConfigFile& file) {
  const Config& config = file.config;
  check_can_write(file, "output_dir", config.run_dir());
  check_can_write(file, "checkpoint_config.output_dir", config.checkpoint_dir());
  check_can_write(file, "logging_dir", config.log_dir());
}

// What may travel from teacher to student: with `auto` that is decided when the run begins.
std::vector<Payload> possible_payloads(const Config& config) {
  if (config.teacher_payload == TeacherPayload::logits) return {Payload::logits};
  if (config.teacher_payload == TeacherPayload::hidden) return {Payload::hidden};
  return {Payload::logits, Payload::hidden};
}

// In shared memory, of the channel to a student of the last stage. By messages it is a group of the two, and between
// GPUs a few words, since the ring is in GPU memory.
std::size_t most_channel_bytes(const RunPlan& plan, const Place& student) {
  if (plan.config.logits_transfer_backend == LogitsTransfer::network) return shared_group_bytes(2);
  if (plan.on_gpus) return 0;
  std::size_t most = 0;
  for (const Payload payload : possible_payloads(plan.config))
    most = std::max(most, channel_bytes(channel_shape(plan, student, payload)));
  return most;
}

std::size_t data_bytes(const DataSet& data) {
  return data.samples.tokens().size_bytes() + data.samples.offsets().size_bytes() +
         data.samples.prompt_lengths().size_bytes();
}

// Warns where a node of the run needs more shared memory than there is here. has_begun: the ranks of the plan are those
// of this run, and what they share already is no longer available.
template <class Warn>
void check_shared_memory(const RunPlan& plan, bool has_begun, const Warn& warn) {
  const int ranks = int(plan.grid.places.size());
  std::map<int, std::size_t> groups = group_bytes(plan.grid, kv_sharers(plan.student, plan.grid.sizes.tp)), channels;
  if (ranks > 1 && !has_begun)  // `check --ranks`: all are planned on one node
    groups[0] +=
        shared_group_bytes(ranks) + data_bytes(plan.train) + (plan.validation ? data_bytes(*plan.validation) : 0);
  std::map<int, int> students;  // by node
  for (const Place& place : plan.grid.places) students[place.node] += is_student(place.role);
  if (students.size() == 1 && students.begin()->second > 1)  // their checkpoint writers are one more group
    groups[students.begin()->first] += shared_group_bytes(students.begin()->second);
  for (const Place& place : plan.grid.places)
    if (place.role == Role::student && place.partner >= 0 && place.pp_rank + 1 == plan.grid.sizes.pp)
      channels[place.node] += most_channel_bytes(plan, place);
  std::size_t of_groups = 0, of_channels = 0;  // on the node that needs most
  for (const auto& [node, bytes] : groups)
    if (bytes + channels[node] > of_groups + of_channels) of_groups = bytes, of_channels = channels[node];
  if (const auto available = shared_memory_available(); of_groups + of_channels > available)
    warn("a node needs ", bytes_text(double(of_groups)), " of shared memory for groups of ranks and ",
         bytes_text(double(of_channels)), " for logits channels, /dev/shm has ", bytes_text(double(available)),
         " here: give it more, start fewer ranks a node",
         of_channels > 0 ? ", lower logits_chunk or logits_ring_slots" : "");
}

// What is legal and yet may not be meant.
std::vector<std::string> warnings_about(const RunPlan& plan, bool has_begun) {
  const Config& config = plan.config;
  std::vector<std::string> warnings;
  const auto warn = [&](const auto&... parts) { warnings.push_back(text(parts...)); };
  for (const DataSet* data : {&plan.train, plan.validation ? &*plan.validation : nullptr})
    if (data) {
      if (data->bad > 0) warn(data->bad_records);
      if (!data->warning.empty()) warn(data->warning);
    }
  const int longest = std::max(plan.train.longest, plan.validation ? plan.validation->longest : 0);
  const auto check_length = [&](const char* role, const ModelSpec& spec) {
    if (longest > spec.max_positions)
      warn("the longest sequence has ", longest, " tokens, the ", role, " was made for ", spec.max_positions,
           " (max_position_embeddings): set sequence_length to that or expect poor results beyond it");
  };
  check_length("student", plan.student);
  if (plan.teacher) check_length("teacher", *plan.teacher);

  const int ranks = plan.grid.sizes.tp * plan.grid.sizes.pp * plan.grid.sizes.dp;
  const auto check_devices = [&](const char* role, const WorkerConfig& worker) {
    if (const std::size_t devices = worker.device_mapping.size(); devices != 0 && devices != std::size_t(ranks))
      warn(role, ".device_mapping names ", devices, " devices, this run has ", ranks, ranks == 1 ? " rank" : " ranks",
           " a role: the mapping is for GPUs and changes nothing on a CPU");
  };
  check_devices("student", config.student);
  if (plan.teacher) check_devices("teacher", config.teacher);
  if (config.student.model_args.disable_gradient_checkpointing &&
      config.student.strategy_args.strategy_config.recompute_granularity)
    warn(
        "student.strategy_args.strategy_config.recompute_granularity changes nothing: "
        "student.model_args.disable_gradient_checkpointing is true");
  if (balances(config.student) && !config.student.use_sequence_packing)
    warn(
        "student.sequence_packing_args.algorithm: load_balance changes nothing: student.use_sequence_packing is false");
  check_shared_memory(plan, has_begun, warn);
  return warnings;
}

Schedule schedule_named(const std::string& name) {
  return *std::find_if(schedules::all.begin(), schedules::all.end(), [&](const Schedule& s) { return s.name == name; });
}

// Models and vocabulary, checked.
void read_models(RunPlan& plan, const ConfigFile& file, std::optional<Tokenizer>& tokenizer) {
  const Config& config = plan.config;
  const std::string &student_folder = config.student.model_args.model_name_or_path,
                    &teacher_folder = config.teacher.model_args.model_name_or_path;
  file.reading(model_key(file, "student"), [&] {
    plan.student = read_model_spec(student_folder);
    tokenizer.emplace(Tokenizer::load(student_folder));
    plan.vocabulary = tokenizer->vocabulary_size();
    check_vocabulary(plan.student, student_folder, plan.vocabulary);
    const ParamTable table = param_table(plan.student);
    plan.student_has_weights = ModelWeights::open(student_folder, table).has_value();
  });
  if (config.needs_teacher())
    file.reading(model_key(file, "teacher"), [&] {
      plan.teacher = read_model_spec(teacher_folder);
      check_same_tokenizer(*tokenizer, student_folder, teacher_folder);
      check_vocabulary(*plan.teacher, teacher_folder, plan.vocabulary);
      const ParamTable table = param_table(*plan.teacher);
      check_input(ModelWeights::open(teacher_folder, table).has_value(), teacher_folder,
                  ": no weights (model.safetensors or model.safetensors.index.json): a teacher must be a trained "
                  "model");
    });
}

// Steps, schedule and chunks: what follows from models and data.
void plan_steps(RunPlan& plan, const ConfigFile& file) {
  const Config& config = plan.config;
  const TrainingArgs& training = config.student.training_args;
  const std::int64_t global_batch = data_plan(plan, 0).shape.global();
  std::int64_t most_supervised = 0;
  file.reading("student.data_args.file_name", [&] { most_supervised = training_data(plan, 0)->most_supervised(); });
  plan.steps_per_epoch = plan.train.samples.size() / global_batch;
  plan.total_steps = config.max_steps > 0 ? config.max_steps : plan.steps_per_epoch * training.num_train_epochs;
  plan.warmup_steps = training.warmup_steps > 0
                          ? training.warmup_steps
                          : std::int64_t(std::ceil(training.warmup_ratio * double(plan.total_steps)));
  plan.schedule = schedule_named(training.lr_scheduler_type);
  const std::int64_t columns = head_part(plan, plan.student, 0).columns;
  const std::int64_t chunk =
      config.logits_chunk.value.value_or(int(default_logits_chunk(columns, config.student.model_args.dtype)));
  plan.logits_chunk = std::min(chunk, std::max<std::int64_t>(1, most_supervised));
}

}  // namespace

Grid plan_grid(const ConfigFile& file, std::span<const int> nodes, std::span<const std::string> hosts) {
  const Config& config = file.config;
  const StrategyConfig& strategy = config.student.strategy_args.strategy_config;
  GridQuestion question{.models = {},
                        .has_teacher = config.needs_teacher(),
                        .node_ranks = {},
                        .tp = strategy.tensor_model_parallel_size,
                        .pp = strategy.pipeline_model_parallel_size};
  const auto read = [&](const char* role, const std::string& folder) {
    file.reading(model_key(file, role), [&] { question.models.push_back(read_model_spec(folder)); });
  };
  read("student", config.student.model_args.model_name_or_path);
  if (config.needs_teacher()) read("teacher", config.teacher.model_args.model_name_or_path);
  std::map<int, int> ranks_of;
  for (const int node : nodes) ++ranks_of[node];
  for (const auto& [_, ranks] : ranks_of) question.node_ranks.push_back(ranks);
  check_sizes_fit(file, question);
  try {
    return make_grid(nodes, question.tp, question.pp, question.has_teacher, hosts);
  } catch (const Error& error) {
    throw Error(error.code(), text(error.what(), "; ", grid_advice(question)));
  }
}

RunPlan make_plan(const ConfigFile& file, const Grid& grid, bool on_gpus, Communicator& world, int threads,
                  const Say& progress) {
  RunPlan plan;
  plan.config = file.config;
  plan.grid = grid;
  plan.on_gpus = on_gpus;
  const Config& config = plan.config;
  std::optional<Tokenizer> tokenizer;
  world.run_together([&] {
    read_models(plan, file, tokenizer);
    plan.cuts_tokens = config.student.strategy_args.strategy_config.sequence_parallel && plan.grid.sizes.tp > 1;
  });
  const DataArgs& data = config.student.data_args;
  plan.train = read_data_once(world, file, {"student.data_args.file_name", data.file_name, data.template_name},
                              *tokenizer, threads, progress);
  const ValidationDataArgs& held_out = config.validation.data_args;
  if (!held_out.file_name.empty())
    plan.validation =
        read_data_once(world, file, {"validation.data_args.file_name", held_out.file_name, held_out.template_name},
                       *tokenizer, threads, progress);
  world.run_together([&] {
    plan_steps(plan, file);
    check_run_folders(file);
    plan.warnings = warnings_about(plan, world.size() == int(grid.places.size()));
  });
  return plan;
}

std::unique_ptr<DataSource> training_data(const RunPlan& plan, int dp_rank) {
  return std::make_unique<EncodedDataSource>(plan.train.samples, data_plan(plan, dp_rank));
}

std::unique_ptr<DataSource> validation_data(const RunPlan& plan, int dp_rank) {
  if (!plan.validation) return nullptr;
  return std::make_unique<EncodedDataSource>(
      plan.validation->samples,
      validation_plan(plan.config.student.infer_batch_size, plan.grid.sizes.dp, dp_rank,
                      data_plan(plan, dp_rank).layout, data_plan(plan, dp_rank).row_multiple));
}

VocabularyPart head_part(const RunPlan& plan, const ModelSpec& spec, int tp_rank) {
  return vocabulary_part(plan.vocabulary, spec.vocabulary, plan.grid.sizes.tp, tp_rank);
}

ChannelShape channel_shape(const RunPlan& plan, const Place& place, Payload payload) {
  return {.positions = plan.logits_chunk,
          .columns =
              payload == Payload::hidden ? plan.teacher->hidden : head_part(plan, *plan.teacher, place.tp_rank).columns,
          .dtype = plan.config.teacher.model_args.dtype,
          .slots = plan.config.logits_ring_slots};
}

CheckpointRun checkpoint_run(const Config& config, const Grid& grid, int threads, const DataSet* data) {
  const TrainingArgs& t = config.student.training_args;
  CheckpointRun run;
  run.version = DISTILL_VERSION;
  run.config = to_yaml(config);
  run.seed = std::uint64_t(config.seed);
  run.threads = threads;
  run.grid = {grid.sizes.tp, grid.sizes.pp, grid.sizes.dp};
  run.samples_per_step = std::int64_t(t.per_device_train_batch_size) * t.gradient_accumulation_steps * grid.sizes.dp;
  if (data) run.data = {data->samples.size(), std::int64_t(data->samples.tokens().size()), data->hash.data()};
  return run;
}

namespace {

void check_no_old_checkpoints(const fs::path& folder) {
  for (const FoundCheckpoint& older : find_checkpoints(folder))
    fail_input(folder.string(), ": holds checkpoints of an earlier run (", fs::path(older.path).filename().string(),
               "): set resume_from_checkpoint=true to go on with it, choose another exp_name, or remove the folder to "
               "start again");
}

}  // namespace

std::vector<std::string> check_checkpoints(const ConfigFile& file, const CheckpointRun& run) {
  const Resume& wanted = file.config.resume_from_checkpoint;
  const fs::path folder = file.config.checkpoint_dir();
  std::vector<std::string> differences;
  if (!wanted.wanted) {
    check_no_old_checkpoints(folder);
    return differences;
  }
  file.reading("resume_from_checkpoint", [&] {
    if (!wanted.path.empty()) {
      differences = check_continues(wanted.path, read_manifest(wanted.path), run);
    } else if (const auto all = complete_checkpoints(folder.string(), [](const std::string&) {}); !all.empty()) {
      differences = check_continues(all.front().path, all.front().manifest, run);
    }
  });
  return differences;
}

std::string count_text(double count) {
  if (count >= 1e9) return format("%.2f billion", count * 1e-9);
  if (count >= 1e6) return format("%.2f million", count * 1e-6);
  return format("%.0f", count);
}

std::string bytes_text(double bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  for (; bytes >= 1024 && unit < 4; ++unit) bytes /= 1024;
  return format(unit == 0 ? "%.0f %s" : "%.2f %s", bytes, units[unit]);
}

namespace {

std::string describe_model(const char* role, const ModelSpec& spec, const std::string& folder, DType dtype,
                           const std::string& note) {
  return text("  ", role, ": ", folder, " (", spec.family, ", ", count_text(double(param_table(spec).count())),
              " parameters, ", spec.layers, " layers, hidden ", spec.hidden, ", heads ", spec.q_heads, "/",
              spec.kv_heads, ", ", name_of(dtype), spec.tied_head ? ", tied head" : "", note, ")\n");
}

std::string describe_data(const char* what, const DataSet& data) {
  std::string out =
      text("  ", what, ": ", data.samples.size(), " records, ", count_text(double(data.samples.tokens().size())),
           " tokens (longest ", data.longest, "), ", count_text(double(data.supervised)), " supervised positions");
  if (data.truncated > 0) out += text("; ", data.truncated, " truncated at sequence_length");
  if (data.left_out > 0) out += text("; ", data.left_out, " left out: no answer token within sequence_length");
  if (data.bad > 0) out += text("; ", data.bad, " bad records left out");
  if (!data.file.empty()) out += text("; from ", data.file);
  return out + "\n";
}

// "1.20 MiB of logits", or of hidden states, or of either.
std::string describe_slot(const RunPlan& plan) {
  std::string out;
  for (const Payload payload : possible_payloads(plan.config)) {
    const ChannelShape shape = channel_shape(plan, Place{}, payload);
    const double bytes = double(shape.positions) * double(shape.columns) * double(size_of(shape.dtype));
    out += text(out.empty() ? "" : " or ", bytes_text(bytes),
                payload == Payload::logits ? " of logits" : " of hidden states");
  }
  return out;
}

}  // namespace

std::string describe(const RunPlan& plan) {
  const Config& config = plan.config;
  const TrainingArgs& training = config.student.training_args;
  std::string out = text("run ", config.exp_name, ": ", plan.grid.places.size(),
                         plan.grid.places.size() == 1 ? " rank" : " ranks", "\n");
  out += describe_model(
      "student", plan.student, config.student.model_args.model_name_or_path, config.student.model_args.dtype,
      plan.student_has_weights
          ? ""
          : "; no weights in the folder: random initialisation from seed " + std::to_string(config.seed));
  if (plan.teacher)
    out += describe_model("teacher", *plan.teacher, config.teacher.model_args.model_name_or_path,
                          config.teacher.model_args.dtype, "");
  out += text("  vocabulary: ", plan.vocabulary, " ids\n");
  out += describe_data("training", plan.train);
  if (plan.validation) out += describe_data("validation", *plan.validation);
  out += text("  steps: ", plan.total_steps, " of ", training.per_device_train_batch_size, " × ",
              training.gradient_accumulation_steps, " × ", plan.grid.sizes.dp, " sequences (batch × accumulation × dp",
              data_plan(plan, 0).balance ? ", dealt to ranks by work" : "", "), ", plan.steps_per_epoch, " an epoch; ",
              training.lr_scheduler_type, " schedule, peak rate ", training.learning_rate, ", ", plan.warmup_steps,
              " warm-up steps\n");
  if (plan.teacher) {
    out += text("  loss: ", 1 - config.distill_loss_weight, " × cross-entropy + ", config.distill_loss_weight, " × ",
                objective_names[std::size_t(config.kd_objective)], " at temperature ", config.kd_temperature,
                config.logits_topk > 0 ? text(", top ", config.logits_topk, " (",
                                              topk_mode_names[std::size_t(config.logits_topk_mode)], ")")
                                       : "",
                "; teacher logits in chunks of ", plan.logits_chunk, " positions");
    if (plan.grid.places.size() > 1)
      out += text(", a ring of ", config.logits_ring_slots, " × ", describe_slot(plan),
                  config.logits_transfer_backend == LogitsTransfer::network ? " by messages"
                  : plan.on_gpus                                            ? " in GPU memory"
                                                                            : " in shared memory",
                  " per student of the last stage");
    out += "\n";
  } else {
    out += "  loss: cross-entropy (distill_loss_weight is 0: no teacher)\n";
  }
  return out;
}

}  // namespace distill
