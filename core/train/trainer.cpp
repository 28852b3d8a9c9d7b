#include "core/train/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "core/train/stopwatch.h"

namespace distill {

namespace {

LossSpec cross_entropy_only(LossSpec spec) {
  spec.distill_weight = 0;
  return spec;
}

// (query, key) pairs of causal attention over packed sequences.
double attention_pairs(const MicroBatch& batch) {
  double pairs = 0;
  for (std::size_t s = 0; s + 1 < batch.offsets.size(); ++s) {
    const double length = double(batch.offsets[s + 1] - batch.offsets[s]);
    pairs += length * (length + 1) / 2;
  }
  return pairs;
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
          "student/val_loss",
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
          "time/data_wait",
          "time/teacher_wait",
          "time/forward",
          "time/loss",
          "time/backward",
          "time/reduce",
          "time/optimizer"};
}

StepTimes& StepTimes::operator+=(const StepTimes& other) {
  data += other.data;
  teacher += other.teacher;
  forward += other.forward;
  loss += other.loss;
  backward += other.backward;
  reduce += other.reduce;
  optimizer += other.optimizer;
  total += other.total;
  return *this;
}

Trainer::Trainer(Device& device, Transformer& student, Optimizer& optimizer, TeacherSource* teacher,
                 const DataSource& data, const DataSource* validation, Communicator& dp, TrainerOptions options,
                 TrainerHooks hooks)
    : device_(device),
      student_(student),
      optimizer_(optimizer),
      teacher_(teacher),
      data_(data),
      validation_(validation),
      dp_(dp),
      options_(options),
      hooks_(std::move(hooks)),
      loss_scale_(student.dtype() == DType::f16),
      batch_(device, std::max(data.most_tokens(), validation ? validation->most_tokens() : 0),
             std::max(data.most_supervised(), validation ? validation->most_supervised() : 0)),
      head_loss_(device, student, options_.loss, options_.logits_chunk, data.most_supervised()) {
  if (validation_)
    validation_head_.emplace(device, student, cross_entropy_only(options_.loss), options_.logits_chunk,
                             validation_->most_supervised());
}

Trainer::End Trainer::run(TrainState& state) {
  nonfinite_in_a_row_ = state.nonfinite_in_a_row;
  if (state.loss_scale > 0) loss_scale_.restore(state.loss_scale, state.loss_scale_good_steps);
  optimizer_.set_updates(state.optimizer_updates);
  const auto due = [&](std::int64_t period) { return period > 0 && state.step % period == 0; };
  std::int64_t saved = state.step;
  const auto save = [&] {
    if (hooks_.save && saved != state.step) hooks_.save(state);
    saved = state.step;
  };
  while (state.step < options_.total_steps) {
    StepResult result;
    {
      const Stopwatch total(device_, result.times.total);
      run_step(state.step, result);
    }
    times_ += result.times;
    ++steps_run_;
    ++state.step;
    state.samples += result.batch.global_samples;
    state.tokens += result.batch.global_tokens;
    state.loss_scale = loss_scale_.value();
    state.loss_scale_good_steps = loss_scale_.good_steps();
    state.nonfinite_in_a_row = nonfinite_in_a_row_;
    state.optimizer_updates = optimizer_.updates();

    const bool last = state.step == options_.total_steps, validate = validation_ && (due(options_.eval_steps) || last);
    MetricRecord metrics = record(state, result);
    if (validate) metrics.values.emplace_back("student/val_loss", validation_loss());
    if (hooks_.report && (due(options_.logging_steps) || validate || last || !result.applied)) hooks_.report(metrics);
    if (nonfinite_in_a_row_ >= options_.max_nonfinite_steps)
      throw Error(ExitCode::non_finite, text("loss or gradient norm was not finite in ", nonfinite_in_a_row_,
                                             " steps in a row, the last of them step ", state.step,
                                             " (max_nonfinite_steps: ", options_.max_nonfinite_steps,
                                             "); the weights are those before the first of them"));
    if (due(options_.save_steps)) save();
    if (!last && hooks_.stop_requested && hooks_.stop_requested()) {
      save();
      return End::stopped;
    }
  }
  save();
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
  const double scale = loss_scale_.value() / count;
  for (const MicroBatch& micro : result.batch.micro) {
    result.pairs += attention_pairs(micro);
    View hidden;
    {
      const Stopwatch watch(device_, times.forward);
      batch_.upload(micro);
      hidden = student_.forward(batch_.batch());
    }
    const double waited = teacher_ ? teacher_->seconds_waited() : 0;
    ConstView dhidden;
    {
      const Stopwatch watch(device_, times.loss);
      if (teacher_) teacher_->begin(micro);
      dhidden = head_loss_.forward_backward(hidden, batch_.labels(), teacher_, scale);
    }
    const double wait = teacher_ ? teacher_->seconds_waited() - waited : 0;
    times.teacher += wait;
    times.loss -= wait;
    const Stopwatch watch(device_, times.backward);
    student_.backward(batch_.batch(), dhidden);
  }
  {
    const Stopwatch watch(device_, times.reduce);
    result.sums = head_loss_.take_sums();
    dp_.all_reduce(result.sums);
    dp_.all_reduce(student_.gradients());
  }
  for (double& sum : result.sums) sum /= count;
  const Stopwatch watch(device_, times.optimizer);
  result.lr = options_.learning_rate * options_.schedule(step, options_.warmup_steps, options_.total_steps);
  apply(result);
}

// Clips and updates, unless loss or gradient is not finite: then nothing changes but the loss scale.
void Trainer::apply(StepResult& result) {
  result.gradient_norm = optimizer_.gradient_norm(student_.gradients()) / loss_scale_.value();
  const bool finite = std::isfinite(result.gradient_norm) && std::isfinite(result.sums[LossTerms::cross_entropy]) &&
                      std::isfinite(result.sums[LossTerms::divergence]);
  if (finite) {
    optimizer_.step(student_.gradients(), result.lr, result.gradient_norm, loss_scale_.value());
    loss_scale_.count_good_step();
    nonfinite_in_a_row_ = 0;
    result.applied = true;
  } else if (loss_scale_.can_shrink()) {
    loss_scale_.shrink();
  } else {
    ++nonfinite_in_a_row_;
  }
}

double Trainer::validation_loss() {
  double positions = 0;
  for (std::int64_t i = 0; i < validation_->steps_per_epoch(); ++i) {
    for (const MicroBatch& micro : validation_->step(i).micro) {
      batch_.upload(micro);
      validation_head_->forward(student_.forward(batch_.batch()), batch_.labels(), nullptr);
      positions += double(micro.supervised.size());
    }
  }
  std::array<double, 2> sums{validation_head_->take_sums()[LossTerms::cross_entropy], positions};
  dp_.all_reduce(sums);
  return sums[0] / std::max(sums[1], 1.0);
}

MetricRecord Trainer::record(const TrainState& state, const StepResult& r) const {
  const double w = options_.loss.distill_weight, ce = r.sums[LossTerms::cross_entropy],
               kd = r.sums[LossTerms::divergence];
  const double tps = double(r.batch.global_tokens) / r.times.total;
  const double students = dp_.size();
  const double flops =
      options_.flops_per_token * double(r.batch.global_tokens) + options_.flops_per_pair * r.pairs * students;
  MetricRecord m{.step = state.step, .wall_time = now(), .values = {}};
  const auto add = [&](const char* name, double value) { m.values.emplace_back(name, value); };
  add("train/loss", w == 0 ? ce : (1 - w) * ce + w * kd);
  if (w != 0) add("train/train_distill_loss", kd);
  add("train/train_student_loss", ce);
  add("student/grad_norm", r.gradient_norm);
  add("student/lr", r.lr);
  if (student_.dtype() == DType::f16) add("student/loss_scale", state.loss_scale);
  add("student/skipped_steps", double(state.step - state.optimizer_updates));
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
  add("time/data_wait", r.times.data);
  add("time/teacher_wait", r.times.teacher);
  add("time/forward", r.times.forward);
  add("time/loss", r.times.loss);
  add("time/backward", r.times.backward);
  add("time/reduce", r.times.reduce);
  add("time/optimizer", r.times.optimizer);
  return m;
}

}  // namespace distill
