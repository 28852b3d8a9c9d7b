#include "core/train/teacher.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <utility>

#include "core/distill/head_loss.h"
#include "core/train/stopwatch.h"

namespace distill {

Teacher::Teacher(Device& device, Transformer& model, std::int64_t real_vocabulary, std::int64_t most_tokens,
                 std::int64_t most_supervised)
    : device_(device),
      model_(model),
      columns_(vocabulary_part(real_vocabulary, model.spec().vocabulary, model.tp().size(), model.tp().rank()).columns),
      batch_(device, most_tokens, most_supervised) {}

View Teacher::begin(const MicroBatch& batch, int m) {
  hidden_ = model_.forward(batch_.upload(batch), m);
  next_ = 0;
  return hidden_;
}

void Teacher::next_logits(View logits) {
  device_.gemm(logits, hidden_.row_slice(next_, logits.rows), transposed(model_.head(columns_)));
  next_ += logits.rows;
}

void Teacher::next_hidden(View hidden) {
  device_.cast(hidden, hidden_.row_slice(next_, hidden.rows));
  next_ += hidden.rows;
}

LocalTeacher::LocalTeacher(Device& device, Teacher& teacher, DType dtype, std::int64_t chunk)
    : device_(device), teacher_(teacher), logits_(device.tensor(chunk, teacher.columns(), dtype)) {}

void LocalTeacher::begin(const MicroBatch& batch) {
  const Stopwatch watch(device_, seconds_);
  teacher_.begin(batch);
}

ConstView LocalTeacher::acquire(std::int64_t positions) {
  const Stopwatch watch(device_, seconds_);
  const View logits = logits_.view().row_slice(0, positions);
  teacher_.next_logits(logits);
  return logits;
}

HiddenTeacherSource::HiddenTeacherSource(Device& device, std::unique_ptr<TeacherSource> channel, Tensor head,
                                         std::int64_t chunk)
    : device_(device),
      channel_(std::move(channel)),
      head_(std::move(head)),
      logits_(device.tensor(chunk, head_.view().rows, head_.view().dtype)) {}

ConstView HiddenTeacherSource::acquire(std::int64_t positions) {
  const ConstView hidden = channel_->acquire(positions);
  const View logits = logits_.view().row_slice(0, positions);
  device_.gemm(logits, hidden, transposed(head_.view()));
  channel_->release();  // the teacher goes on while the loss is computed
  return logits;
}

TeacherLoop::TeacherLoop(Device& device, Teacher& teacher, const DataSource& data, LogitsSink* sink, std::int64_t chunk,
                         Payload payload, Communicator& pp_forward, Communicator& pp_backward)
    : device_(device),
      teacher_(teacher),
      data_(data),
      sink_(sink),
      chunk_(chunk),
      payload_(payload),
      pp_backward_(pp_backward),
      links_(pp_forward, pp_backward) {
  check((sink != nullptr) == links_.is_last(), "a logits channel belongs to the last stage of a teacher");
}

namespace {

// The micro-batches of a range of steps and of the validations between them, in the order of the student's forwards.
class MicroBatches {
 public:
  MicroBatches(const DataSource& data, std::int64_t first_step, std::int64_t last_step, const Validation& validation)
      : data_(data), validation_(validation), next_step_(first_step), last_step_(last_step) {}

  // Null at the end.
  std::shared_ptr<const MicroBatch> next() {
    while (ready_.empty()) {
      if (validation_left_ > 0) {
        take(validation_.data->step(validation_.data->steps_per_epoch() - validation_left_--));
      } else if (next_step_ < last_step_) {
        take(data_.step(next_step_++));
        if (validation_.is_due(next_step_)) validation_left_ = validation_.data->steps_per_epoch();
      } else {
        return nullptr;
      }
    }
    const auto micro = ready_.front();
    ready_.pop_front();
    return micro;
  }

 private:
  void take(StepBatch batch) {
    for (MicroBatch& micro : batch.micro) ready_.push_back(std::make_shared<const MicroBatch>(std::move(micro)));
  }

  const DataSource& data_;
  Validation validation_;
  std::int64_t next_step_, last_step_;
  std::int64_t validation_left_ = 0;  // batches of the validation under way
  std::deque<std::shared_ptr<const MicroBatch>> ready_;
};

}  // namespace

void TeacherLoop::run(std::int64_t first_step, std::int64_t last_step, const Validation& validation) {
  MicroBatches all(data_, first_step, last_step, validation);
  std::shared_ptr<const MicroBatch> micro = all.next(), next;
  expect(micro.get(), 0);
  for (int m = 0; micro; ++m, micro = std::move(next)) {
    next = all.next();
    if (!is_wanted()) {
      // The stage before has been asked for this micro-batch, and will ask whether there is to be another.
      links_.receive_input();
      if (next) ask(false);
      return;
    }
    links_.receive_input();
    expect(next.get(), m + 1);
    const View out = teacher_.begin(*micro, m);
    device_.synchronize();
    if (!feed(*micro)) is_closed_ = true;
    links_.send_output(out, 1);
  }
  links_.finish();
}

// Asks the stage before for a micro-batch and begins to receive it.
void TeacherLoop::expect(const MicroBatch* micro, int m) {
  if (!micro) return;
  ask(true);
  links_.expect_input(teacher_.model().stage_input(std::int64_t(micro->tokens.size()), m));
}

void TeacherLoop::ask(bool wanted) {
  if (!links_.is_first()) pp_backward_.send(wanted ? "more" : "enough", links_.stage() - 1);
}

// What the next stage says, or on the last one what the students of the tensor-parallel group have said so far.
bool TeacherLoop::is_wanted() {
  if (links_.is_last()) return !teacher_.model().tp().group().any(is_closed_);
  return pp_backward_.recv(links_.stage() + 1) == "more";
}

// The logits of a micro-batch, or the hidden states, into the channel; false when the student has closed it.
bool TeacherLoop::feed(const MicroBatch& micro) {
  if (!sink_) return true;
  if (is_closed_) return false;
  sink_->begin(micro);
  const std::int64_t count = std::int64_t(micro.supervised.size());
  for (std::int64_t first = 0; first < count; first += chunk_) {
    const View slot = sink_->acquire(std::min(chunk_, count - first));
    if (!slot.data) return false;
    payload_ == Payload::hidden ? teacher_.next_hidden(slot) : teacher_.next_logits(slot);
    sink_->publish();
  }
  return true;
}

}  // namespace distill
