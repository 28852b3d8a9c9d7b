// The student's loop: batch, forward, loss against the teacher, backward, gradient sum, clip, AdamW, metrics.
#pragma once

#include <array>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "core/communicator.h"
#include "core/distill/head_loss.h"
#include "core/optim/loss_scale.h"
#include "core/optim/optimizer.h"
#include "core/optim/schedule.h"
#include "core/train/batch_on_device.h"
#include "core/train/gradient_sync.h"
#include "core/train/metrics.h"
#include "core/train/outlier.h"
#include "core/train/pipeline.h"
#include "core/train/train_state.h"
#include "core/train/validation.h"

namespace distill {

struct TrainerOptions {
  std::int64_t total_steps = 0;
  std::int64_t logging_steps = 1, save_steps = 50, eval_steps = 10;  // 0: never
  double learning_rate = 5e-5;
  double (*schedule)(std::int64_t, std::int64_t, std::int64_t) = schedules::linear;
  std::int64_t warmup_steps = 0;
  LossSpec loss;
  std::int64_t logits_chunk = 512;
  int max_nonfinite_steps = 5;
  OutlierAction outlier_action = OutlierAction::off;
  int outlier_window = 100;    // steps
  double outlier_zscore = 6;   // above which a loss or gradient norm is an outlier
  double flops_per_token = 0;  // of both roles, without attention scores
  double flops_per_pair = 0;   // of both roles, per (query, key) pair of causal attention
  double peak_flops = 0;       // per second and rank, for MFU
  int ranks = 1;               // of both roles
  int micro_batches = 1;       // of a step, per data-parallel rank
};

// What the loop calls on; every member is optional but must be callable when given.
struct TrainerHooks {
  std::function<void(const MetricRecord&)> report;    // every logging_steps and whenever there is a validation
  std::function<void(const TrainState&)> save;        // every save_steps and at the end
  std::function<void()> finish_saves = {};            // waits until what was saved is kept; before run() ends
  std::function<bool()> stop_requested;               // asked between steps, agreed among ranks
  std::function<void(const std::string&)> warn = {};  // on every rank
};

// Names of all metrics a run can report, in the order of its CSV columns.
std::vector<std::string> metric_names();

// Where the time of one or more steps went, seconds. As metrics, time/…, and in Trainer::times() they are means over
// the student ranks, but validation and checkpoint are of this rank; time/teacher_wait (for logits) and
// time/student_wait (of the teacher for a free slot) over those that have a teacher, which are the last stages.
struct StepTimes {
  double data = 0, teacher = 0, pipeline = 0, forward = 0, loss = 0, backward = 0, reduce = 0, optimizer = 0, total = 0;
  double student_wait = 0;                // of the teacher, meanwhile
  double validation = 0, checkpoint = 0;  // between steps
  std::array<double*, 12> all() {
    return {&data,   &teacher,   &pipeline, &forward,      &loss,       &backward,
            &reduce, &optimizer, &total,    &student_wait, &validation, &checkpoint};
  }
  StepTimes& operator+=(StepTimes other);
};

// The groups in which a student rank trains.
struct StudentGroups {
  Communicator& students;  // the whole grid
  Communicator& dp;
  Communicator& pp_forward;
  Communicator& pp_backward;
};

class Trainer {
 public:
  enum class End { finished, stopped };

  // `teacher` is null when distill_weight is 0 and on all but the last stage, `validation` where there is none.
  Trainer(Device& device, Transformer& student, Optimizer& optimizer, GradientSync& sync, TeacherSource* teacher,
          const DataSource& data, const DataSource* validation, const StudentGroups& groups, TrainerOptions options,
          TrainerHooks hooks);

  // Steps [state.step, total_steps). Throws Error(non_finite) after max_nonfinite_steps in a row, and at an outlier
  // that is to stop the run, once the state before that step is saved.
  End run(TrainState& state);

  // Means of the loss terms over the supervised positions of the validation data, all ranks together; those that need a
  // teacher are 0 without one.
  LossSums validate();

  // Of all steps so far in this process, and how many they are.
  const StepTimes& times() const { return times_; }
  std::int64_t steps_run() const { return steps_run_; }

 private:
  struct StepResult {
    LossSums sums{};  // over all ranks
    double gradient_norm = 0, lr = 0;
    bool applied = false;
    std::string outlier;  // what stood out; empty: nothing
    StepBatch batch;
    double pairs = 0;                // (query, key) pairs of this rank's micro-batches
    StepTimes times;                 // of this rank, then means over all
    std::int64_t channel_bytes = 0;  // that all ranks got from their teachers
  };

  void run_step(std::int64_t step, StepResult& result);
  void in_pipeline(StepTimes& times, const std::function<void()>& work);
  void forward(int m, double scale, StepResult& result);
  void backward(int m, StepResult& result);
  // Of what the last stages know: sums over its ranks that count, on every rank.
  void sum_over_last_stages(std::span<double> values);
  bool counts_loss() const { return links_.is_last() && student_.tp().rank() == 0; }
  double loss(const StepResult& result) const;
  void apply(StepResult& result);
  // Returns the cross-entropy.
  double add_validation(MetricRecord& metrics);
  void update(StepResult& result);
  std::string outlier(const StepResult& result) const;
  MetricRecord record(const TrainState& state, const StepResult& result) const;

  Device& device_;
  Transformer& student_;
  Optimizer& optimizer_;
  GradientSync& sync_;
  TeacherSource* teacher_;
  const DataSource& data_;
  Validation validation_;
  StudentGroups groups_;
  PipelineLinks links_;
  TrainerOptions options_;
  TrainerHooks hooks_;
  LossScale loss_scale_;
  std::vector<BatchOnDevice> batches_;  // one a micro-batch in flight
  std::optional<HeadLoss> head_loss_;   // last stage
  ConstView dhidden_;
  int nonfinite_in_a_row_ = 0;
  OutlierWindow recent_losses_, recent_gradient_norms_;
  StepTimes times_;
  std::int64_t steps_run_ = 0;
};

}  // namespace distill
