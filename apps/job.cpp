#include "apps/job.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <iostream>
#include <memory>

#include "apps/channel.h"
#include "apps/flops.h"
#include "apps/signals.h"
#include "core/out_of_memory.h"
#include "core/train/teacher.h"
#include "core/train/time_report.h"
#include "core/train/trainer.h"
#include "io/checkpoint.h"
#include "io/console_sink.h"
#include "io/durable_file.h"
#include "io/metric_sinks.h"
#include "io/run_folder.h"
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
  o.outlier_action = c.outlier_action;
  o.outlier_window = c.outlier_window;
  o.outlier_zscore = c.outlier_zscore;
  o.flops_per_token = flops_per_token(plan.student, true) + (plan.teacher ? flops_per_token(*plan.teacher, false) : 0);
  o.flops_per_pair = flops_per_pair(plan.student, true) + (plan.teacher ? flops_per_pair(*plan.teacher, false) : 0);
  o.peak_flops = peak_flops;
  o.ranks = int(plan.grid.places.size());
  o.micro_batches = c.student.training_args.gradient_accumulation_steps;
  return o;
}

// Where the run starts: at a checkpoint or at the beginning. All students call it.
TrainState resume(const RunPlan& plan, CheckpointStore& store, StudentSide& student, const Say& say) {
  const Config& config = plan.config;
  std::string path;
  if (const Resume& wanted = config.resume_from_checkpoint; wanted.wanted)
    path = wanted.path.empty() ? store.newest().value_or("") : wanted.path;
  if (path.empty()) {
    if (config.resume_from_checkpoint.wanted) say("no checkpoint to resume from: starting at step 0");
    return {};
  }
  const TrainState state = store.load(path, student.state(CheckpointUse::load));
  say(text("resumed from ", path, " after step ", state.step));
  return state;
}

// Where a run writes beside its own folder.
std::vector<std::string> run_folders(const Config& config) {
  return {config.checkpoint_dir().parent_path().string(), config.log_dir().string()};
}

// What the first student writes beside checkpoints and export.
std::vector<std::unique_ptr<MetricSink>> open_outputs(const RunFolder& folder, const RunPlan& plan,
                                                      const TrainState& state,
                                                      const std::function<void(const std::string&)>& warn) {
  const Config& config = plan.config;
  auto sinks = make_sinks(config.track_with, {.folder = config.log_dir().string(),
                                              .names = metric_names(),
                                              .resumed_step = state.step,
                                              .last_record = state.last_record,
                                              .warn = warn});
  // mpirun gives ranks a terminal for their standard output wherever that goes, but not for standard error.
  const bool is_terminal = isatty(STDOUT_FILENO) && isatty(STDERR_FILENO);
  sinks.push_back(std::make_unique<ConsoleSink>(std::cout, is_terminal, plan.total_steps, [] {
    return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
  }));
  folder.clear_finished();
  write_durably(folder.file("config.yaml"), to_yaml(config));
  return sinks;
}

// run_together where ranks wait for the slowest as long as it takes.
void run_long(Communicator& group, const std::function<void()>& work) {
  const WaitForWork patience(group);
  group.run_together(work);
}

// Steps of this rank. On GPUs a rank that fails alone ends the run where it stands: what it gave back on its way out
// waits for all that was begun on its GPU, also for what others would have to join who wait for this rank.
void run_steps(MpiSession& mpi, const RunDevices& devices, const std::function<void()>& steps) {
  if (!devices.are_gpus() || mpi.ranks() == 1) return steps();
  try {
    steps();
  } catch (const CommonError&) {
    throw;
  } catch (const Error& error) {
    end_run(mpi, error.what(), error.code());
  } catch (const std::exception& error) {
    end_run(mpi, error.what(), ExitCode::internal);
  }
}

}  // namespace

int end_run(MpiSession& mpi, const char* message, ExitCode code) {
  if (mpi.ranks() == 1) {
    std::cerr << "distill: " << message << std::endl;
    return int(code);
  }
  if (code == ExitCode::peer_lost) mpi.await_explanation();
  std::cerr << "distill: " << name_of(mpi.me()) << ": " << message << std::endl;
  mpi.abort_all(int(code));
}

ExitCode run_job(const RunPlan& plan, const RunDevices& devices, MpiSession& mpi, int threads,
                 Clock::time_point started, const Say& say) {
  Communicator& world = mpi.world();
  const Config& config = plan.config;
  const Place& place = plan.grid.places[std::size_t(world.rank())];
  std::unique_ptr<Device> device;  // before what uses it to the last
  Groups groups = make_groups(world, plan.grid, kv_sharers(plan.student, plan.grid.sizes.tp));
  const bool leads = world.rank() == 0;  // the first student: writes what is written once
  std::optional<RunFolder> folder;
  const auto warn = [](const std::string& message) { std::cerr << "warning: " << message << std::endl; };
  world.run_together([&] {
    if (leads) folder.emplace(config.run_dir().string(), run_folders(config), warn);
  });
  world.run_together([&] { device = make_device(devices, config, plan.grid, world.rank(), threads); });
  move_to_device(groups, *device, devices);
  const std::unique_ptr<DataSource> data = training_data(plan, place.dp_rank),
                                    validation = validation_data(plan, place.dp_rank);
  const Sizes sizes{.tokens = std::max(data->most_tokens(), validation ? validation->most_tokens() : 0),
                    .supervised = std::max(data->most_supervised(), validation ? validation->most_supervised() : 0),
                    .longest = std::max(plan.train.longest, plan.validation ? plan.validation->longest : 0)};
  const StopSignals signals([&mpi] { mpi.ask_to_stop(); });

  // Each step of the preparation succeeds on all ranks or on none, so that what is wrong is said once.
  const bool studies = is_student(place.role), teaches = plan.teacher && is_teacher(place.role);
  // Students keep the time. Their validations and checkpoints take as long as they take, and a teacher waits meanwhile.
  if (!studies) groups.set_patience(world.patience().while_alive());
  std::optional<StudentSide> student;
  std::optional<TeacherSide> teacher;
  run_long(world, [&] {
    if (studies) with_memory_for("the student's model", [&] { student.emplace(*device, plan, sizes, place, groups); });
    if (teaches)
      with_memory_for("the teacher's model", [&] { teacher.emplace(*device, plan, sizes, place, *groups.tp); });
  });
  const Payload payload = decide_payload(plan, *device, world, say);
  std::optional<Channel> channel;
  run_long(world, [&] {
    with_memory_for("the logits channel", [&] {
      channel.emplace(plan, payload, devices.are_gpus(), *device, place, groups, teacher ? &*teacher : nullptr);
    });
  });
  std::vector<std::unique_ptr<MetricSink>> sinks;  // before the checkpoints, whose thread uses them
  std::optional<CheckpointFolder> checkpoints;
  TrainState state;
  run_long(world, [&] {
    const WaitForWork patience(*groups.role);
    if (studies) {
      checkpoints.emplace(config.checkpoint_dir().string(), checkpoint_run(config, plan.grid, threads, &plan.train),
                          StoredPlace{place.tp_rank, place.pp_rank, place.dp_rank}, config.max_ckpt_to_keep, *device,
                          *groups.role, warn, [&] {
                            for (const auto& metrics : sinks) metrics->sync();
                          });
      with_memory_for("the copy of the state that checkpoints are written from",
                      [&] { checkpoints->reserve(student->state(CheckpointUse::save)); });
      state = resume(plan, *checkpoints, *student, say);
    }
    if (leads) sinks = open_outputs(*folder, plan, state, warn);
  });
  const std::int64_t first_step = std::stoll(world.broadcast(std::to_string(state.step), /*root=*/0));
  if (!studies) {
    TeacherLoop loop(*device, teacher->teacher, *data, channel->sink.get(), plan.logits_chunk, payload,
                     *groups.pp_forward, *groups.pp_backward);
    run_steps(mpi, devices, [&] {
      loop.run(first_step, plan.total_steps, {validation.get(), config.eval_steps, plan.total_steps});
    });
    return ExitCode::ok;
  }

  const double peak_flops =
      config.peak_flops.value ? *config.peak_flops.value : measure_peak_flops(*device, config.student.model_args.dtype);
  TrainerHooks hooks;
  hooks.report = [&](const MetricRecord& record) {
    for (const auto& metrics : sinks) metrics->write(record);
  };
  if (leads) hooks.warn = warn;
  hooks.save = [&](const TrainState& at) {
    const WaitForWork patience(*groups.role);
    checkpoints->save(at, student->state(CheckpointUse::save));
  };
  hooks.finish_saves = [&] {
    try {
      checkpoints->finish();
    } catch (const CommonError& error) {  // of the writers, who have warned of it with its reason
      throw CommonError(error.code(), "the last checkpoint is not kept: see the warning above");
    }
  };
  bool is_late = false;
  hooks.stop_requested = [&] {
    is_late = leads && config.max_time && Clock::now() - started >= *config.max_time;  // one clock decides for all
    return groups.role->any(is_late || mpi.stop_asked());
  };
  Trainer trainer(*device, student->model, student->optimizer, student->sync, channel->source.get(), *data,
                  validation.get(), {*groups.role, *groups.dp, *groups.pp_forward, *groups.pp_backward},
                  trainer_options(plan, peak_flops), std::move(hooks));
  device->reset_op_times();
  Trainer::End end{};
  run_steps(mpi, devices, [&] { end = trainer.run(state); });
  sinks.clear();
  say(time_report(trainer.times(), trainer.steps_run(), *device, peak_flops));
  if (end == Trainer::End::stopped) {
    say(text("stopped by ", is_late ? "the time limit (max_time)" : "a signal", " after step ", state.step, " of ",
             plan.total_steps, "; run the same command with resume_from_checkpoint=true to go on"));
    return ExitCode::interrupted;
  }
  run_long(*groups.role, [&] {
    const std::string out = leads ? folder->file("export") : "";
    export_student(out, plan, *device, *student, *groups.role);
    if (!leads) return;
    folder->mark_finished(state.step);
    say(text("finished ", plan.total_steps, " steps; the student is in ", out));
  });
  return ExitCode::ok;
}

}  // namespace distill
