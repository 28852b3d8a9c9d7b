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
      validation_(validation),
      groups_(groups),
      links_(groups.pp_forward, groups.pp_backward),
      options_(options),
      hooks_(std::move(hooks)),
      loss_scale_(student.dtype() == DType::f16) {
  const std::int64_t tokens = std::max(data.most_tokens(), validation ? validation->most_tokens() : 0),
                     supervised = std::max(data.most_supervised(), validation ? validation->most_supervised() : 0);
  for (int i = 0; i < most_in_flight(links_.stages(), links_.stage(), options.micro_batches); ++i)
    batches_.emplace_back(device, tokens, supervised);
  if (!links_.is_last()) return;
  head_loss_.emplace(device, student, options_.loss, options_.logits_chunk, data.most_supervised(),
                     &student.tp().group());
  if (validation_)
    validation_head_.emplace(device, student, cross_entropy_only(options_.loss), options_.logits_chunk,
                             validation_->most_supervised(), &student.tp().group());
}

Trainer::End Trainer::run(TrainState& state) {
  nonfinite_in_a_row_ = state.nonfinite_in_a_row;
  if (state.loss_scale > 0) loss_scale_.restore(state.loss_scale, state.loss_scale_good_steps);
  optimizer_.set_updates(state.optimizer_updates);
  const auto due = [&](std::int64_t period) { return period > 0 && state.step % period == 0; };
  std::int64_t saved = state.step;
  const auto save = [&] {
    const Stopwatch watch(device_, times_.checkpoint);
    if (hooks_.save && saved != state.step) hooks_.save(state);
    saved = state.step;
  };
  double checkpoints_reported = 0;
  while (state.step < options_.total_steps) {
    StepResult result;
    {
      const Stopwatch total(device_, result.times.total);
      run_step(state.step, result);
    }
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

    const bool last = state.step == options_.total_steps, validate = validation_ && (due(options_.eval_steps) || last);
    MetricRecord metrics = record(state, result);
    // Of the checkpoints since the step before.
    metrics.values.emplace_back("time/checkpoint_stall", times_.checkpoint - checkpoints_reported);
    checkpoints_reported = times_.checkpoint;
    metrics.values.emplace_back("memory/peak", peak_memory);
    if (validate) {
      const Stopwatch watch(device_, times_.validation);
      metrics.values.emplace_back("student/val_loss", validation_loss());
    }
    if (hooks_.report && (due(options_.logging_steps) || validate || last || !result.applied)) hooks_.report(metrics);
    if (nonfinite_in_a_row_ >= options_.max_nonfinite_steps)
      throw CommonError(ExitCode::non_finite, text("loss or gradient norm was not finite in ", nonfinite_in_a_row_,
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
  const std::vector<MicroBatch>& micro = result.batch.micro;
  const std::int64_t moved = teacher_ ? teacher_->bytes_moved() : 0;
  if (!micro.empty()) {
    links_.expect_input(student_.stage_input(std::int64_t(micro[0].tokens.size()), 0));
    links_.expect_gradient(student_.output_gradient(std::int64_t(micro[0].tokens.size())));
  }
  for (const PipelineTask& task : one_f_one_b(links_.stages(), links_.stage(), int(micro.size()))) {
    if (task.kind == PipelineTask::Kind::forward)
      forward(task.micro, loss_scale_.value() / count, result);
    else
      backward(task.micro, result);
  }
  links_.finish();
  times.pipeline += links_.take_seconds_waited();
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

void Trainer::forward(int m, double scale, StepResult& result) {
  const std::vector<MicroBatch>& all = result.batch.micro;
  const MicroBatch& micro = all[std::size_t(m)];
  result.pairs += attention_pairs(micro);
  links_.receive_input();
  if (m + 1 < int(all.size()))
    links_.expect_input(student_.stage_input(std::int64_t(all[std::size_t(m) + 1].tokens.size()), m + 1));
  BatchOnDevice& batch = batches_[std::size_t(m) % batches_.size()];
  View out;
  {
    const Stopwatch watch(device_, result.times.forward);
    batch.upload(micro);
    out = student_.forward(batch.batch(), m);
  }
  links_.send_output(out, batches_.size());
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
  links_.receive_gradient();
  View dinput;
  {
    const Stopwatch watch(device_, result.times.backward);
    const auto ready = [this](std::size_t bucket) { sync_.bucket_ready(bucket); };
    dinput = student_.backward(batches_[std::size_t(m) % batches_.size()].batch(), dhidden_, m,
                               is_last ? Transformer::BucketReady(ready) : nullptr);
  }
  links_.send_gradient(dinput, 1);
  if (!is_last) links_.expect_gradient(student_.output_gradient(std::int64_t(all[std::size_t(m) + 1].tokens.size())));
}

void Trainer::sum_over_last_stages(std::span<double> values) {
  if (!counts_loss()) std::fill(values.begin(), values.end(), 0.0);
  groups_.students.all_reduce(values);
}

// Clips and updates, unless loss or gradient is not finite: then nothing changes but the loss scale.
void Trainer::apply(StepResult& result) {
  result.gradient_norm =
      std::sqrt(groups_.students.all_reduce(optimizer_.squared_norm(student_.gradients(), loss_scale_.value())));
  const bool finite = std::isfinite(result.gradient_norm) && std::isfinite(result.sums[LossTerms::cross_entropy]) &&
                      std::isfinite(result.sums[LossTerms::divergence]);
  if (finite) {
    optimizer_.step(student_.gradients(), result.lr, result.gradient_norm, loss_scale_.value());
    sync_.share_values();
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
  const std::int64_t steps = validation_->steps_per_epoch();
  std::array<double, 2> sums{};  // cross-entropy, positions
  int m = 0;
  // A rank may have no part in the last batch. What comes next is known early, so that it can be received meanwhile.
  std::vector<MicroBatch> micro = validation_->step(0).micro, next;
  const auto expect = [&](const std::vector<MicroBatch>& batch, int number) {
    if (!batch.empty()) links_.expect_input(student_.stage_input(std::int64_t(batch.front().tokens.size()), number));
  };
  expect(micro, m);
  for (std::int64_t step = 0; step < steps && !micro.empty(); ++step, ++m, micro = std::move(next)) {
    check(micro.size() == 1, "validation in ", micro.size(), " micro-batches a step");
    next.clear();
    if (step + 1 < steps) next = validation_->step(step + 1).micro;
    links_.receive_input();
    expect(next, m + 1);
    BatchOnDevice& batch = batches_[std::size_t(m) % batches_.size()];
    batch.upload(micro.front());
    const View out = student_.forward(batch.batch(), m);
    links_.send_output(out, batches_.size() - 1);
    if (validation_head_) validation_head_->forward(out, batch.labels(), nullptr);
    sums[1] += double(micro.front().supervised.size());
  }
  links_.finish();
  links_.take_seconds_waited();  // is no part of a step
  if (validation_head_) sums[0] = validation_head_->take_sums()[LossTerms::cross_entropy];
  sum_over_last_stages(sums);
  return sums[0] / std::max(sums[1], 1.0);
}

MetricRecord Trainer::record(const TrainState& state, const StepResult& r) const {
  const double w = options_.loss.distill_weight, ce = r.sums[LossTerms::cross_entropy],
               kd = r.sums[LossTerms::divergence];
  const double tps = double(r.batch.global_tokens) / r.times.total;
  const double flops =
      options_.flops_per_token * double(r.batch.global_tokens) + options_.flops_per_pair * r.pairs * groups_.dp.size();
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
