#include "core/train/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "core/train/stopwatch.h"

namespace distill {

namespace {

// (query, key) pairs of causal attention over packed sequences.
double attention_pairs(const MicroBatch& batch) {
  double pairs = 0;
  for (std::size_t s = 0; s + 1 < batch.offsets.size(); ++s) {
    const double length = double(batch.offsets[s + 1] - batch.offsets[s]);
    pairs += length * (length + 1) / 2;
  }
  return pairs;
}

// The step takes as long on every rank; what it was spent on differs. Only ranks of the last stage have a teacher that
// waits for them, and that wait is beside the step: its mean is over those.
void average_over_ranks(StepTimes& times, Communicator& ranks, int stages) {
  std::array<double, 12> sums{};
  for (std::size_t i = 0; i < sums.size(); ++i) sums[i] = *times.all()[i];
  ranks.all_reduce(sums);
  for (std::size_t i = 0; i < sums.size(); ++i) *times.all()[i] = sums[i] / ranks.size();
  times.student_wait *= stages;
}

double now() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

}  // namespace

std::vector<std::string> metric_names() {
  return {"train/loss",
          "train/train_distill_loss",
          "train/train_student_loss",
          "student/grad_norm",
          "student/lr",
          "student/loss_scale",
          "student/skipped_steps",
          "student/outlier_steps",
          "student/val_loss",
          "student/val_distill_loss",
          "student/val_perplexity",
          "student/val_top1_agreement",
          "distill/student_entropy",
          "distill/teacher_entropy",
          "distill/top1_agreement",
          "distill/topk_mass",
          "train/step_train",
          "train/epoch",
          "global_seqlen/mean",
          "system/tps",
          "system/tps_per_rank",
          "system/mfu",
          "system/samples",
          "system/tokens",
          "system/supervised",
          "system/pipeline_bubble",
          "system/channel_bytes",
          "time/data_wait",
          "time/teacher_wait",
          "time/student_wait",
          "time/pipeline_bubble",
          "time/forward",
          "time/loss",
          "time/backward",
          "time/reduce",
          "time/optimizer",
          "time/checkpoint_stall",
          "memory/peak"};
}

StepTimes& StepTimes::operator+=(StepTimes other) {
  for (std::size_t i = 0; i < all().size(); ++i) *all()[i] += *other.all()[i];
  return *this;
}

Trainer::Trainer(Device& device, Transformer& student, Optimizer& optimizer, GradientSync& sync, TeacherSource* teacher,
                 const DataSource& data, const DataSource* validation, const StudentGroups& groups,
                 TrainerOptions options, TrainerHooks hooks)
    : device_(device),
      student_(student),
      optimizer_(optimizer),
      sync_(sync),
      teacher_(teacher),
      data_(data),
      validation_{validation, options.eval_steps, options.total_steps},
      groups_(groups),
      links_(groups.pp_forward, groups.pp_backward),
      options_(options),
      hooks_(std::move(hooks)),
      loss_scale_(student.dtype() == DType::f16),
      recent_losses_(std::size_t(options.outlier_window)),
      recent_gradient_norms_(std::size_t(options.outlier_window)) {
  const std::int64_t tokens = std::max(data.most_tokens(), validation ? validation->most_tokens() : 0),
                     supervised = std::max(data.most_supervised(), validation ? validation->most_supervised() : 0);
  for (int i = 0; i < most_in_flight(links_.stages(), links_.stage(), options.micro_batches); ++i)
    batches_.emplace_back(device, tokens, supervised);
  if (!links_.is_last()) return;
  head_loss_.emplace(device, student, options_.loss, options_.logits_chunk, supervised, &student.tp().group());
}

Trainer::End Trainer::run(TrainState& state) {
  nonfinite_in_a_row_ = state.nonfinite_in_a_row;
  if (state.loss_scale > 0) loss_scale_.restore(state.loss_scale, state.loss_scale_good_steps);
  optimizer_.set_updates(state.optimizer_updates);
  recent_losses_.restore(state.recent_losses);
  recent_gradient_norms_.restore(state.recent_gradient_norms);
  const auto due = [&](std::int64_t period) { return period > 0 && state.step % period == 0; };
  std::int64_t saved = state.step;
  const auto save = [&] {
    const Stopwatch watch(device_, times_.checkpoint);
    if (hooks_.save && saved != state.step) hooks_.save(state);
    saved = state.step;
  };
  const auto finish_saves = [&] {
    const Stopwatch watch(device_, times_.checkpoint);
    if (hooks_.finish_saves) hooks_.finish_saves();
  };
  double checkpoints_reported = 0;
  while (state.step < options_.total_steps) {
    StepResult result;
    {
      const Stopwatch total(device_, result.times.total);
      run_step(state.step, result);
    }
    const bool is_outlier = !result.outlier.empty(),
               stops = is_outlier && options_.outlier_action == OutlierAction::stop;
    if (stops) save();  // the state before the step, which has changed nothing
    average_over_ranks(result.times, groups_.students, links_.stages());
    times_ += result.times;
    const double peak_memory = groups_.students.all_reduce(device_.peak_memory(), Reduce::max);
    ++steps_run_;
    ++state.step;
    state.samples += result.batch.global_samples;
    state.tokens += result.batch.global_tokens;
    state.loss_scale = loss_scale_.value();
    state.loss_scale_good_steps = loss_scale_.good_steps();
    state.nonfinite_in_a_row = nonfinite_in_a_row_;
    state.optimizer_updates = optimizer_.updates();
    state.validation_loss.reset();
    state.outlier_steps += is_outlier;
    state.recent_losses = recent_losses_.values();
    state.recent_gradient_norms = recent_gradient_norms_.values();

    const bool last = state.step == options_.total_steps, validate = validation_.is_due(state.step);
    MetricRecord metrics = record(state, result);
    // Of all checkpoints since the last report.
    metrics.values.emplace_back("time/checkpoint_stall", times_.checkpoint - checkpoints_reported);
    metrics.values.emplace_back("memory/peak", peak_memory);
    if (validate) {
      const Stopwatch watch(device_, times_.validation);
      const double loss = add_validation(metrics);
      if (std::isfinite(loss)) state.validation_loss = loss;
    }
    if (hooks_.report && (due(options_.logging_steps) || validate || last || !result.applied)) {
      hooks_.report(metrics);
      state.last_record = state.step;
      checkpoints_reported = times_.checkpoint;
    }
    if (stops) {
      finish_saves();
      throw CommonError(
          ExitCode::non_finite,
          text("step ", state.step, ": ", result.outlier, " (outlier_action: stop); the state after step ",
               state.step - 1,
               " is saved, and resume_from_checkpoint=true goes on from it with outlier_action=skip or warn"));
    }
    if (is_outlier && hooks_.warn)
      hooks_.warn(text("step ", state.step, ": ", result.outlier, result.applied ? "" : "; the step is skipped"));
    if (nonfinite_in_a_row_ >= options_.max_nonfinite_steps) {
      try {
        finish_saves();
      } catch (const CommonError&) {  // has been reported, and is not why the run ends
      }
      throw CommonError(ExitCode::non_finite,
                        text("loss or gradient norm was not finite ",
                             options_.outlier_action == OutlierAction::skip ? "or an outlier " : "", "in ",
                             nonfinite_in_a_row_, " steps in a row, the last of them step ", state.step,
                             " (max_nonfinite_steps: ", options_.max_nonfinite_steps,
                             "); the weights are those before the first of them"));
    }
    if (due(options_.save_steps)) save();
    if (!last && hooks_.stop_requested && hooks_.stop_requested()) {
      save();
      finish_saves();
      return End::stopped;
    }
  }
  save();
  finish_saves();
  return End::finished;
}

void Trainer::run_step(std::int64_t step, StepResult& result) {
  StepTimes& times = result.times;
  {
    const Stopwatch watch(device_, times.data);
    result.batch = data_.step(step);
  }
  device_.zero(student_.gradients());
  const double count = double(std::max<std::int64_t>(result.batch.global_supervised, 1));
  const std::vector<MicroBatch>& micro = result.batch.micro;
  const std::int64_t moved = teacher_ ? teacher_->bytes_moved() : 0;
  if (!micro.empty()) links_.expect_input(student_.stage_input(std::int64_t(micro[0].tokens.size()), 0));
  for (const PipelineTask& task : one_f_one_b(links_.stages(), links_.stage(), int(micro.size()))) {
    if (task.kind == PipelineTask::Kind::forward)
      forward(task.micro, loss_scale_.value() / count, result);
    else
      backward(task.micro, result);
  }
  in_pipeline(times, [&] { links_.finish(); });
  {
    const Stopwatch watch(device_, times.reduce);
    sync_.finish();
    if (head_loss_) result.sums = head_loss_->take_sums();
    sum_over_last_stages(result.sums);
    double bytes = teacher_ ? double(teacher_->bytes_moved() - moved) : 0;
    result.channel_bytes = std::int64_t(groups_.students.all_reduce(bytes));
  }
  for (double& sum : result.sums) sum /= count;
  const Stopwatch watch(device_, times.optimizer);
  result.lr = options_.learning_rate * options_.schedule(step, options_.warmup_steps, options_.total_steps);
  apply(result);
}

// What a stage does with its neighbours; the time counts in which its device waits in the place of the host, too.
void Trainer::in_pipeline(StepTimes& times, const std::function<void()>& work) {
  if (links_.stages() == 1) return work();
  const Stopwatch watch(device_, times.pipeline);
  work();
}

void Trainer::forward(int m, double scale, StepResult& result) {
  const std::vector<MicroBatch>& all = result.batch.micro;
  const MicroBatch& micro = all[std::size_t(m)];
  result.pairs += attention_pairs(micro);
  in_pipeline(result.times, [&] { links_.receive_input(); });
  if (m + 1 < int(all.size()))
    links_.expect_input(student_.stage_input(std::int64_t(all[std::size_t(m) + 1].tokens.size()), m + 1));
  BatchOnDevice& batch = batches_[std::size_t(m) % batches_.size()];
  View out;
  {
    const Stopwatch watch(device_, result.times.forward);
    batch.upload(micro);
    out = student_.forward(batch.batch(), m);
  }
  in_pipeline(result.times, [&] { links_.send_output(out, batches_.size()); });
  if (!head_loss_) return;
  const double waited = teacher_ ? teacher_->seconds_waited() : 0,
               teacher_waited = teacher_ ? teacher_->teacher_seconds_waited() : 0;
  {
    const Stopwatch watch(device_, result.times.loss);
    if (teacher_) teacher_->begin(micro);
    dhidden_ = head_loss_->forward_backward(out, batch.labels(), teacher_, scale);
  }
  const double wait = teacher_ ? teacher_->seconds_waited() - waited : 0;
  result.times.teacher += wait;
  result.times.loss -= wait;
  if (teacher_) result.times.student_wait += teacher_->teacher_seconds_waited() - teacher_waited;
}

void Trainer::backward(int m, StepResult& result) {
  const std::vector<MicroBatch>& all = result.batch.micro;
  const bool is_last = m + 1 == int(all.size());
  const auto expect_gradient = [&](int of) {
    links_.expect_gradient(student_.output_gradient(std::int64_t(all[std::size_t(of)].tokens.size())));
  };
  // The first only now: a stage may expect nothing that depends on work it has not begun (parallel/nccl_group.cpp).
  if (m == 0) expect_gradient(0);
  in_pipeline(result.times, [&] { links_.receive_gradient(); });
  View dinput;
  {
    const Stopwatch watch(device_, result.times.backward);
    const auto ready = [this](std::size_t bucket) { sync_.bucket_ready(bucket); };
    dinput = student_.backward(batches_[std::size_t(m) % batches_.size()].batch(), dhidden_, m,
                               is_last ? Transformer::BucketReady(ready) : nullptr);
  }
  in_pipeline(result.times, [&] { links_.send_gradient(dinput, 1); });
  if (!is_last) expect_gradient(m + 1);
}

void Trainer::sum_over_last_stages(std::span<double> values) {
  if (!counts_loss()) std::fill(values.begin(), values.end(), 0.0);
  groups_.students.all_reduce(values);
}

double Trainer::loss(const StepResult& result) const {
  const double w = options_.loss.distill_weight, ce = result.sums[LossTerms::cross_entropy];
  return w == 0 ? ce : (1 - w) * ce + w * result.sums[LossTerms::divergence];
}

// Clips and updates, unless loss or gradient is not finite, then nothing changes but the loss scale, or an outlier that
// is not to be used. All ranks know the same sums, so all decide the same.
void Trainer::apply(StepResult& result) {
  result.gradient_norm =
      std::sqrt(groups_.students.all_reduce(optimizer_.squared_norm(student_.gradients(), loss_scale_.value())));
  const bool finite = std::isfinite(result.gradient_norm) && std::isfinite(result.sums[LossTerms::cross_entropy]) &&
                      std::isfinite(result.sums[LossTerms::divergence]);
  if (finite) {
    result.outlier = outlier(result);
    if (result.outlier.empty() || options_.outlier_action == OutlierAction::warn) return update(result);
  } else if (loss_scale_.can_shrink()) {
    return loss_scale_.shrink();
  }
  ++nonfinite_in_a_row_;
}

void Trainer::update(StepResult& result) {
  optimizer_.step(student_.gradients(), result.lr, result.gradient_norm, loss_scale_.value());
  sync_.share_values();
  loss_scale_.count_good_step();
  nonfinite_in_a_row_ = 0;
  result.applied = true;
  if (options_.outlier_action == OutlierAction::off) return;
  recent_losses_.accept(loss(result));
  recent_gradient_norms_.accept(result.gradient_norm);
}

std::string Trainer::outlier(const StepResult& result) const {
  if (options_.outlier_action == OutlierAction::off) return "";
  std::string found;
  const auto judge = [&](const char* name, double value, const OutlierWindow& before) {
    const double z = before.zscore(value);
    if (z > options_.outlier_zscore)
      found +=
          text(found.empty() ? "" : ", and ", name, ' ', value, " is an outlier: z-score ", z, ", mean ", before.mean(),
               " and standard deviation ", before.deviation(), " of the ", options_.outlier_window, " steps before");
  };
  judge("the loss", loss(result), recent_losses_);
  judge("the gradient norm", result.gradient_norm, recent_gradient_norms_);
  return found;
}

LossSums Trainer::validate() {
  const DataSource& data = *validation_.data;
  const std::int64_t steps = data.steps_per_epoch();
  double positions = 0;
  int m = 0;
  // A rank may have no part in the last batch. What comes next is known early, so that it can be received meanwhile.
  std::vector<MicroBatch> micro = data.step(0).micro, next;
  const auto expect = [&](const std::vector<MicroBatch>& batch, int number) {
    if (!batch.empty()) links_.expect_input(student_.stage_input(std::int64_t(batch.front().tokens.size()), number));
  };
  expect(micro, m);
  for (std::int64_t step = 0; step < steps && !micro.empty(); ++step, ++m, micro = std::move(next)) {
    check(micro.size() == 1, "validation in ", micro.size(), " micro-batches a step");
    next.clear();
    if (step + 1 < steps) next = data.step(step + 1).micro;
    links_.receive_input();
    expect(next, m + 1);
    BatchOnDevice& batch = batches_[std::size_t(m) % batches_.size()];
    batch.upload(micro.front());
    const View out = student_.forward(batch.batch(), m);
    links_.send_output(out, batches_.size() - 1);
    if (head_loss_) {
      if (teacher_) teacher_->begin(micro.front());
      head_loss_->forward(out, batch.labels(), teacher_);
    }
    positions += double(micro.front().supervised.size());
  }
  links_.finish();
  LossSums means{};
  if (head_loss_) means = head_loss_->take_sums();
  sum_over_last_stages(means);
  sum_over_last_stages({&positions, 1});
  for (double& mean : means) mean /= std::max(positions, 1.0);
  return means;
}

double Trainer::add_validation(MetricRecord& metrics) {
  const LossSums means = validate();
  const double loss = means[LossTerms::cross_entropy];
  metrics.values.emplace_back("student/val_loss", loss);
  metrics.values.emplace_back("student/val_perplexity", std::exp(loss));
  if (options_.loss.distill_weight == 0) return loss;
  metrics.values.emplace_back("student/val_distill_loss", means[LossTerms::divergence]);
  metrics.values.emplace_back("student/val_top1_agreement", means[LossTerms::top1_agreement]);
  return loss;
}

MetricRecord Trainer::record(const TrainState& state, const StepResult& r) const {
  const double w = options_.loss.distill_weight, ce = r.sums[LossTerms::cross_entropy],
               kd = r.sums[LossTerms::divergence];
  const double tps = double(r.batch.global_tokens) / r.times.total;
  const double flops =
      options_.flops_per_token * double(r.batch.global_tokens) + options_.flops_per_pair * r.pairs * groups_.dp.size();
  MetricRecord m{.step = state.step, .wall_time = now(), .values = {}};
  const auto add = [&](const char* name, double value) { m.values.emplace_back(name, value); };
  add("train/loss", loss(r));
  if (w != 0) add("train/train_distill_loss", kd);
  add("train/train_student_loss", ce);
  add("student/grad_norm", r.gradient_norm);
  add("student/lr", r.lr);
  if (student_.dtype() == DType::f16) add("student/loss_scale", state.loss_scale);
  add("student/skipped_steps", double(state.step - state.optimizer_updates));
  if (options_.outlier_action != OutlierAction::off) add("student/outlier_steps", double(state.outlier_steps));
  add("distill/student_entropy", r.sums[LossTerms::student_entropy]);
  if (w != 0) {
    add("distill/teacher_entropy", r.sums[LossTerms::teacher_entropy]);
    add("distill/top1_agreement", r.sums[LossTerms::top1_agreement]);
    if (options_.loss.topk > 0) add("distill/topk_mass", r.sums[LossTerms::topk_mass]);
  }
  add("train/step_train", r.times.total);
  add("train/epoch", r.batch.epoch);
  add("global_seqlen/mean", double(r.batch.global_tokens) / double(std::max<std::int64_t>(r.batch.global_samples, 1)));
  add("system/tps", tps);
  add("system/tps_per_rank", tps / options_.ranks);
  if (options_.peak_flops > 0) add("system/mfu", flops / r.times.total / (options_.peak_flops * options_.ranks));
  add("system/samples", double(state.samples));
  add("system/tokens", double(state.tokens));
  add("system/supervised", double(r.batch.global_supervised));
  if (links_.stages() > 1) add("system/pipeline_bubble", r.times.pipeline / r.times.total);
  if (w != 0) add("system/channel_bytes", double(r.channel_bytes));
  add("time/data_wait", r.times.data);
  add("time/teacher_wait", r.times.teacher * links_.stages());  // the mean over ranks that have a teacher
  if (w != 0) add("time/student_wait", r.times.student_wait);
  if (links_.stages() > 1) add("time/pipeline_bubble", r.times.pipeline);
  add("time/forward", r.times.forward);
  add("time/loss", r.times.loss);
  add("time/backward", r.times.backward);
  add("time/reduce", r.times.reduce);
  add("time/optimizer", r.times.optimizer);
  return m;
}

}  // namespace distill
