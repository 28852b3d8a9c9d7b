#include "apps/job.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <memory>

#include "apps/models.h"
#include "apps/signals.h"
#include "core/train/teacher.h"
#include "core/train/time_report.h"
#include "core/train/trainer.h"
#include "io/checkpoint.h"
#include "io/durable_file.h"
#include "io/export.h"
#include "io/metric_sinks.h"
#include "io/run_folder.h"
#include "kernels/backends.h"
#include "parallel/parallel.h"

namespace distill {

namespace {

LossSpec loss_spec(const RunPlan& plan) {
  const Config& c = plan.config;
  return {.objective = c.kd_objective,
          .distill_weight = float(c.distill_loss_weight),
          .temperature = float(c.kd_temperature),
          .teacher_temperature = float(c.teacher_temperature),
          .adaptive_alpha = float(c.adaptive_kl_alpha),
          .skew_lambda = float(c.skew_lambda),
          .topk = c.logits_topk,
          .topk_mode = c.logits_topk_mode,
          .vocabulary = plan.vocabulary};
}

// Largest micro-batch of training and validation.
struct Sizes {
  std::int64_t tokens = 0, supervised = 0;
  int longest = 0;
};

// 2 FLOP a parameter and token forward, 4 backward; the embedding look-up is none. Causal attention: 4 FLOP per pair
// and column forward, 8 backward.
double flops_per_token(const ModelSpec& spec, bool trains) {
  const double embedding = spec.tied_head ? 0 : double(spec.vocabulary) * double(spec.hidden);
  return (trains ? 6 : 2) * (double(param_table(spec).count()) - embedding);
}
double flops_per_pair(const ModelSpec& spec, bool trains) {
  return (trains ? 12 : 4) * double(spec.layers) * double(spec.q_cols());
}

TrainerOptions trainer_options(const RunPlan& plan, double peak_flops) {
  const Config& c = plan.config;
  TrainerOptions o;
  o.total_steps = plan.total_steps;
  o.logging_steps = c.logging_steps;
  o.save_steps = c.save_steps;
  o.eval_steps = c.eval_steps;
  o.learning_rate = c.student.training_args.learning_rate;
  o.schedule = plan.schedule.factor;
  o.warmup_steps = plan.warmup_steps;
  o.loss = loss_spec(plan);
  o.logits_chunk = plan.logits_chunk;
  o.max_nonfinite_steps = c.max_nonfinite_steps;
  o.flops_per_token = flops_per_token(plan.student, true) + (plan.teacher ? flops_per_token(*plan.teacher, false) : 0);
  o.flops_per_pair = flops_per_pair(plan.student, true) + (plan.teacher ? flops_per_pair(*plan.teacher, false) : 0);
  o.peak_flops = peak_flops;
  o.ranks = int(plan.grid.places.size());
  return o;
}

OptimizerConfig optimizer_config(const RunPlan& plan) {
  const TrainingArgs& t = plan.config.student.training_args;
  return {.beta1 = t.adam_beta1,
          .beta2 = t.adam_beta2,
          .epsilon = t.adam_epsilon,
          .weight_decay = t.weight_decay,
          .max_grad_norm = plan.config.max_grad_norm};
}

// The teacher's model and what it runs on.
struct TeacherSide {
  Transformer model;
  Teacher teacher;

  TeacherSide(Device& device, const RunPlan& plan, const Sizes& sizes)
      : model(device, *plan.teacher, plan.config.teacher.model_args.dtype,
              {.tokens = sizes.tokens,
               .supervised = sizes.supervised,
               .longest = sizes.longest,
               .trains = false,
               .recompute = Recompute::none}),
        teacher(device, model, plan.vocabulary, sizes.tokens, sizes.supervised) {
    fill_weights(device, plan.config.teacher.model_args.model_name_or_path, model.table(), model.spec(),
                 std::uint64_t(plan.config.seed), model.values(), View());
  }
};

struct StudentSide {
  Transformer model;
  Optimizer optimizer;

  StudentSide(Device& device, const RunPlan& plan, const Sizes& sizes)
      : model(device, plan.student, plan.config.student.model_args.dtype,
              {.tokens = sizes.tokens,
               .supervised = sizes.supervised,
               .longest = sizes.longest,
               .trains = true,
               .recompute =
                   plan.config.student.model_args.disable_gradient_checkpointing ? Recompute::none : Recompute::full}),
        optimizer(device, model.table(), model.values(), optimizer_config(plan)) {
    fill_weights(device, plan.config.student.model_args.model_name_or_path, model.table(), model.spec(),
                 std::uint64_t(plan.config.seed), model.values(), optimizer.masters());
  }
};

// Everything that a resumed run needs of the student, by name.
std::vector<CheckpointTensor> state_tensors(StudentSide& student) {
  std::vector<CheckpointTensor> tensors;
  const auto add = [&](std::string_view kind, const View& flat) {
    if (!flat.data) return;
    const auto part = checkpoint_tensors(kind, student.model.table(), flat);
    tensors.insert(tensors.end(), part.begin(), part.end());
  };
  add("values", student.model.values());
  add("master", student.optimizer.masters());
  add("exp_avg", student.optimizer.exp_avg());
  add("exp_avg_sq", student.optimizer.exp_avg_sq());
  return tensors;
}

// Where the run starts: at a checkpoint or at the beginning. All students call it; the first one decides.
TrainState resume(const RunPlan& plan, CheckpointStore& store, StudentSide& student, Communicator& students,
                  const Say& say) {
  const Config& config = plan.config;
  std::string path;
  students.run_together([&] {
    if (students.rank() != 0) return;
    if (const Resume& wanted = config.resume_from_checkpoint; wanted.wanted)
      path = wanted.path.empty() ? store.newest().value_or("") : wanted.path;
  });
  path = students.broadcast(path, /*root=*/0);
  if (path.empty()) {
    if (config.resume_from_checkpoint.wanted) say("no checkpoint to resume from: starting at step 0");
    return {};
  }
  TrainState state;
  students.run_together([&] { state = store.load(path, state_tensors(student)); });
  say(text("resumed from ", path, " after step ", state.step));
  return state;
}

void export_student(const std::string& folder, const RunPlan& plan, Device& device, Transformer& model) {
  const std::string& source = plan.config.student.model_args.model_name_or_path;
  Tensor staging;
  const auto read = [&](const Param& param, std::int64_t first, std::span<float> values) {
    const std::int64_t n = std::int64_t(values.size());
    if (!staging || staging.view().cols < n) staging = device.tensor(1, n, DType::f32);
    const View block = staging.view().col_slice(0, n);
    device.cast(block, model.values().col_slice(param.offset + first, n));
    device.download(values.data(), block);
  };
  export_model(folder, {.model = source, .tokenizer = source}, model.table(), model.dtype(), read);
}

// What the first student writes beside checkpoints and export.
std::vector<std::unique_ptr<MetricSink>> open_outputs(const RunFolder& folder, const RunPlan& plan,
                                                      std::int64_t first_step, const CsvSink::Warn& warn) {
  const Config& config = plan.config;
  const std::filesystem::path log_dir = config.log_dir();
  std::error_code error;
  std::filesystem::create_directories(log_dir, error);
  check_input(!error, log_dir.string(), ": cannot create: ", error.message());
  std::vector<std::unique_ptr<MetricSink>> sinks;
  // mpirun gives ranks a terminal for their standard output wherever that goes, but not for standard error.
  const bool is_terminal = isatty(STDOUT_FILENO) && isatty(STDERR_FILENO);
  sinks.push_back(std::make_unique<ConsoleSink>(std::cout, is_terminal, plan.total_steps));
  sinks.push_back(std::make_unique<CsvSink>((log_dir / "metrics.csv").string(), metric_names(), first_step, warn));
  folder.clear_finished();
  write_durably(folder.file("config.yaml"), to_yaml(config));
  return sinks;
}

}  // namespace

ExitCode run_job(const RunPlan& plan, Communicator& world, int threads, Clock::time_point started, const Say& say) {
  const Config& config = plan.config;
  const Place& place = plan.grid.places[std::size_t(world.rank())];
  const Groups groups = make_groups(world, plan.grid);
  const bool leads = world.rank() == 0;  // the first student: writes what is written once
  std::optional<RunFolder> folder;
  world.run_together([&] {
    if (leads) folder.emplace(config.run_dir().string());
  });
  const std::unique_ptr<Device> device = make_cpu_device(threads);
  const std::unique_ptr<DataSource> data = training_data(plan, place.dp_rank),
                                    validation = validation_data(plan, place.dp_rank);
  const Sizes sizes{.tokens = std::max(data->most_tokens(), validation ? validation->most_tokens() : 0),
                    .supervised = std::max(data->most_supervised(), validation ? validation->most_supervised() : 0),
                    .longest = std::max(plan.train.longest, plan.validation ? plan.validation->longest : 0)};
  catch_stop_signals();

  // Each step of the preparation succeeds on all ranks or on none, so that what is wrong is said once.
  const bool studies = place.role != Role::teacher, teaches = place.role != Role::student && plan.teacher;
  std::optional<StudentSide> student;
  std::optional<TeacherSide> teacher;
  world.run_together([&] {
    if (studies) student.emplace(*device, plan, sizes);
    if (teaches) teacher.emplace(*device, plan, sizes);
  });
  std::unique_ptr<TeacherSource> source;
  std::unique_ptr<LogitsSink> sink;
  world.run_together([&] {
    if (studies && teaches)
      source =
          std::make_unique<LocalTeacher>(*device, teacher->teacher, config.teacher.model_args.dtype, plan.logits_chunk);
    else if (teaches)
      sink = open_shared_sink(world, place.partner, channel_shape(plan));
    else if (plan.teacher)
      source = open_shared_source(world, place.partner, channel_shape(plan));
  });
  const auto warn = [](const std::string& message) { std::cerr << "warning: " << message << std::endl; };
  // Every student holds the whole state, so the first one writes it and each reads it.
  Alone self;
  CheckpointFolder checkpoints(
      config.checkpoint_dir().string(), checkpoint_run(config, plan.grid, threads), {}, config.max_ckpt_to_keep,
      *device, self, leads ? CheckpointFolder::Warn(warn) : [](const std::string&) {});
  TrainState state;
  std::vector<std::unique_ptr<MetricSink>> sinks;
  world.run_together([&] {
    if (studies) state = resume(plan, checkpoints, *student, *groups.role, say);
    if (leads) sinks = open_outputs(*folder, plan, state.step, warn);
  });
  const std::int64_t first_step = std::stoll(world.broadcast(std::to_string(state.step), /*root=*/0));
  if (!studies) {
    TeacherLoop{*device, teacher->teacher, *data, *sink, plan.logits_chunk}.run(first_step, plan.total_steps);
    return ExitCode::ok;
  }

  const double peak_flops =
      config.peak_flops.value ? *config.peak_flops.value : measure_peak_flops(*device, config.student.model_args.dtype);
  TrainerHooks hooks;
  hooks.report = [&](const MetricRecord& record) {
    for (const auto& output : sinks) output->write(record);
  };
  hooks.save = [&](const TrainState& at) {
    groups.role->run_together([&] {
      if (leads) checkpoints.save(at, state_tensors(*student));
    });
  };
  bool is_late = false;
  hooks.stop_requested = [&] {
    is_late = leads && config.max_time && Clock::now() - started >= *config.max_time;  // one clock decides for all
    return groups.role->any(is_late || stop_signal_came());
  };
  Trainer trainer(*device, student->model, student->optimizer, source.get(), *data, validation.get(), *groups.dp,
                  trainer_options(plan, peak_flops), std::move(hooks));
  device->reset_op_times();
  const Trainer::End end = trainer.run(state);
  sinks.clear();
  say(time_report(trainer.times(), trainer.steps_run(), *device, peak_flops));
  if (end == Trainer::End::stopped) {
    say(text("stopped by ", is_late ? "the time limit (max_time)" : "a signal", " after step ", state.step, " of ",
             plan.total_steps, "; run the same command with resume_from_checkpoint=true to go on"));
    return ExitCode::interrupted;
  }
  groups.role->run_together([&] {
    if (!leads) return;
    const std::string out = folder->file("export");
    export_student(out, plan, *device, student->model);
    folder->mark_finished(state.step);
    say(text("finished ", plan.total_steps, " steps; the student is in ", out));
  });
  return ExitCode::ok;
}

}  // namespace distill
