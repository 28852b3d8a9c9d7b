#include "apps/run_plan.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>

#include "core/distill/head_loss.h"
#include "core/model/params.h"
#include "io/chat_template.h"
#include "io/model_folder.h"
#include "io/records.h"
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

std::string joined(const std::vector<std::string>& words) {
  std::string all;
  for (const std::string& word : words) all += (all.empty() ? "" : ", ") + word;
  return all;
}

// The key that chose a role's model folder.
std::string model_key(const ConfigFile& file, std::string_view role) {
  const std::string of_role = text(role, ".model_args.model_name_or_path");
  return file.written.contains(of_role) ? of_role : text(role, "_pretrain");
}

// The key that chose the template of records; that of validation is by default the student's.
std::string template_key(const ConfigFile& file, std::string_view data_key) {
  const std::string own = text(data_key.substr(0, data_key.rfind('.')), ".template");
  return file.written.contains(own) ? own : "student.data_args.template";
}

// `key` is where `files` was configured.
DataSet read_data(const ConfigFile& file, std::string_view key, const std::vector<std::string>& files,
                  const std::string& template_name, const Tokenizer& tokenizer, int threads, const Say& progress) {
  const Config& config = file.config;
  const RecordFields fields{.question = config.question_key,
                            .answer = config.answer_key,
                            .prompt = config.prompt_key,
                            .system = config.system_key};
  Records records;
  file.reading(key, [&] { records = read_records(files, fields, config.student.data_args.skip_bad_records); });
  std::optional<ChatTemplate> chat;
  file.reading(template_key(file, key),
               [&] { chat.emplace(ChatTemplate::load(template_name, config.student.model_args.model_name_or_path)); });
  EncodeOptions options;
  options.sequence_length = config.sequence_length;
  options.distill_on_prompt = config.distill_on_prompt;
  options.threads = threads;
  options.progress = [&](std::int64_t done, std::int64_t total) {
    progress(text("encoding ", done, " of ", total, " records"));
  };
  EncodedRecords encoded = encode_records(
      records.records, [&](std::string_view t) { return tokenizer.encode(t); },
      [&](std::span<const Message> conversation, bool prompt) { return chat->render(conversation, prompt); }, options);
  check_input(encoded.samples.size() > 0, file.where(key), ": ", key, ": none of the ", records.records.size(),
              " records of ", joined(files), " has an answer that begins within ", config.sequence_length,
              " tokens (sequence_length)");
  DataSet data;
  if (records.bad > 0) data.bad_records = records.describe_bad();
  data.bad = records.bad;
  data.truncated = encoded.truncated;
  data.left_out = encoded.left_out;
  data.samples = std::move(encoded.samples);
  for (std::int64_t i = 0; i < data.samples.size(); ++i) {
    data.longest = std::max(data.longest, int(data.samples[i].tokens.size()));
    data.supervised += data.samples[i].supervised();
  }
  return data;
}

DataPlan data_plan(const RunPlan& plan, int dp_rank) {
  const WorkerConfig& worker = plan.config.student;
  return {.shape = {.per_device = worker.training_args.per_device_train_batch_size,
                    .accumulation = worker.training_args.gradient_accumulation_steps,
                    .dp_size = plan.grid.sizes.dp},
          .dp_rank = dp_rank,
          .layout = worker.use_sequence_packing ? Layout::packed : Layout::padded,
          .last = LastBatch::drop,
          .seed = std::uint64_t(plan.config.seed),
          .shuffle = worker.data_args.shuffle};
}

// Fails now where the run could not write later: the nearest folder that exists must let us make others in it.
void check_can_write(const ConfigFile& file, std::string_view key, const fs::path& folder) {
  std::error_code ignored;
  fs::path nearest = fs::absolute(folder);
  while (nearest.has_relative_path() && !fs::exists(nearest, ignored)) nearest = nearest.parent_path();
  const bool is_folder = fs::is_directory(nearest, ignored);
  check_input(is_folder && access(nearest.c_str(), W_OK | X_OK) == 0, file.where(key), ": ", key, ": cannot write to ",
              folder.string(), ": ", nearest.string(),
              is_folder ? text(": ", std::strerror(errno)) : " is not a folder");
}

void check_run_folders(const ConfigFile& file) {
  const Config& config = file.config;
  check_can_write(file, "output_dir", config.run_dir());
  check_can_write(file, "checkpoint_config.output_dir", config.checkpoint_dir());
  check_can_write(file, "logging_dir", config.log_dir());
}

// What is legal and yet may not be meant.
std::vector<std::string> warnings_about(const RunPlan& plan) {
  const Config& config = plan.config;
  std::vector<std::string> warnings;
  const auto warn = [&](const auto&... parts) { warnings.push_back(text(parts...)); };
  for (const DataSet* data : {&plan.train, plan.validation ? &*plan.validation : nullptr})
    if (data && data->bad > 0) warn(data->bad_records);
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
  const std::vector<std::string>& teacher_files = config.teacher.data_args.file_name;
  if (plan.teacher && !teacher_files.empty() && teacher_files != config.student.data_args.file_name)
    warn("teacher.data_args.file_name is ignored: both roles read the student's records");
  if (plan.teacher && int(plan.grid.places.size()) > ranks) {
    std::map<int, std::size_t> needed;  // bytes by node
    for (const Place& place : plan.grid.places)
      if (place.role == Role::student) needed[place.node] += channel_bytes(channel_shape(plan));
    std::size_t most = 0;
    for (const auto& [node, bytes] : needed) most = std::max(most, bytes);
    if (const auto available = shared_memory_available(); most > available)
      warn("the logits channels of a node need ", bytes_text(double(most)), " of shared memory, /dev/shm has ",
           bytes_text(double(available)), " here: lower logits_chunk or logits_ring_slots");
  }
  return warnings;
}

Schedule schedule_named(const std::string& name) {
  return *std::find_if(schedules::all.begin(), schedules::all.end(), [&](const Schedule& s) { return s.name == name; });
}

}  // namespace

RunPlan make_plan(const ConfigFile& file, const Grid& grid, int threads, const Say& progress) {
  RunPlan plan;
  plan.config = file.config;
  plan.grid = grid;
  const Config& config = plan.config;
  const std::string &student_folder = config.student.model_args.model_name_or_path,
                    &teacher_folder = config.teacher.model_args.model_name_or_path;

  std::optional<Tokenizer> tokenizer;
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

  const DataArgs& data = config.student.data_args;
  plan.train =
      read_data(file, "student.data_args.file_name", data.file_name, data.template_name, *tokenizer, threads, progress);
  const ValidationDataArgs& held_out = config.validation.data_args;
  if (!held_out.file_name.empty())
    plan.validation = read_data(file, "validation.data_args.file_name", held_out.file_name, held_out.template_name,
                                *tokenizer, threads, progress);

  const TrainingArgs& training = config.student.training_args;
  const std::int64_t global_batch = data_plan(plan, 0).shape.global();
  check_input(plan.train.samples.size() >= global_batch, file.where("student.data_args.file_name"),
              ": student.data_args.file_name: ", plan.train.samples.size(), " usable records: expected at least ",
              global_batch, ", one global batch (per_device_train_batch_size ", training.per_device_train_batch_size,
              " × gradient_accumulation_steps ", training.gradient_accumulation_steps, " × dp ", plan.grid.sizes.dp,
              ")");
  plan.steps_per_epoch = plan.train.samples.size() / global_batch;
  plan.total_steps = config.max_steps > 0 ? config.max_steps : plan.steps_per_epoch * training.num_train_epochs;
  plan.warmup_steps = training.warmup_steps > 0
                          ? training.warmup_steps
                          : std::int64_t(std::ceil(training.warmup_ratio * double(plan.total_steps)));
  plan.schedule = schedule_named(training.lr_scheduler_type);
  const std::int64_t columns = head_columns(plan.vocabulary, plan.student.vocabulary);
  const std::int64_t chunk =
      config.logits_chunk.value.value_or(int(default_logits_chunk(columns, config.student.model_args.dtype)));
  plan.logits_chunk = std::min(chunk, std::max<std::int64_t>(1, training_data(plan, 0)->most_supervised()));
  check_run_folders(file);
  plan.warnings = warnings_about(plan);
  return plan;
}

std::unique_ptr<DataSource> training_data(const RunPlan& plan, int dp_rank) {
  return std::make_unique<EncodedDataSource>(plan.train.samples, data_plan(plan, dp_rank));
}

std::unique_ptr<DataSource> validation_data(const RunPlan& plan, int dp_rank) {
  if (!plan.validation) return nullptr;
  return std::make_unique<EncodedDataSource>(
      plan.validation->samples, validation_plan(plan.config.student.infer_batch_size, plan.grid.sizes.dp, dp_rank,
                                                data_plan(plan, dp_rank).layout));
}

ChannelShape channel_shape(const RunPlan& plan) {
  return {.positions = plan.logits_chunk,
          .columns = head_columns(plan.vocabulary, plan.teacher->vocabulary),
          .dtype = plan.config.teacher.model_args.dtype,
          .slots = plan.config.logits_ring_slots};
}

CheckpointRun checkpoint_run(const Config& config, const Grid& grid, int threads) {
  const TrainingArgs& t = config.student.training_args;
  CheckpointRun run;
  run.version = DISTILL_VERSION;
  run.config = to_yaml(config);
  run.seed = std::uint64_t(config.seed);
  run.threads = threads;
  run.grid = {grid.sizes.tp, grid.sizes.pp, grid.sizes.dp};
  run.samples_per_step = std::int64_t(t.per_device_train_batch_size) * t.gradient_accumulation_steps * grid.sizes.dp;
  return run;
}

namespace {

void check_no_old_checkpoints(const fs::path& folder) {
  std::error_code missing;
  for (const auto& entry : fs::directory_iterator(folder, missing))
    check_input(!entry.path().filename().string().starts_with("step-"), folder.string(),
                ": holds checkpoints of an earlier run (", entry.path().filename().string(),
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
      text("  ", what, ": ", data.samples.size(), " records, ", count_text(double(data.samples.tokens.size())),
           " tokens (longest ", data.longest, "), ", count_text(double(data.supervised)), " supervised positions");
  if (data.truncated > 0) out += text("; ", data.truncated, " truncated at sequence_length");
  if (data.left_out > 0) out += text("; ", data.left_out, " left out: no answer token within sequence_length");
  if (data.bad > 0) out += text("; ", data.bad, " bad records left out");
  return out + "\n";
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
  out +=
      text("  steps: ", plan.total_steps, " of ", training.per_device_train_batch_size, " × ",
           training.gradient_accumulation_steps, " × ", plan.grid.sizes.dp, " sequences (batch × accumulation × dp), ",
           plan.steps_per_epoch, " an epoch; ", training.lr_scheduler_type, " schedule, peak rate ",
           training.learning_rate, ", ", plan.warmup_steps, " warm-up steps\n");
  if (plan.teacher) {
    const double slot = double(plan.logits_chunk) * double(head_columns(plan.vocabulary, plan.teacher->vocabulary)) *
                        double(size_of(config.teacher.model_args.dtype));
    out += text("  loss: ", 1 - config.distill_loss_weight, " × cross-entropy + ", config.distill_loss_weight, " × ",
                objective_names[std::size_t(config.kd_objective)], " at temperature ", config.kd_temperature,
                config.logits_topk > 0 ? text(", top ", config.logits_topk, " (",
                                              topk_mode_names[std::size_t(config.logits_topk_mode)], ")")
                                       : "",
                "; teacher logits in chunks of ", plan.logits_chunk, " positions");
    if (plan.grid.places.size() > 1)
      out += text(", a ring of ", config.logits_ring_slots, " × ", bytes_text(slot), " in shared memory per student");
    out += "\n";
  } else {
    out += "  loss: cross-entropy (distill_loss_weight is 0: no teacher)\n";
  }
  return out;
}

}  // namespace distill
