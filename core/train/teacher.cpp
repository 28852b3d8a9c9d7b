#include "core/train/teacher.h"

#include <algorithm>
#include <utility>

#include "core/distill/head_loss.h"
#include "core/train/stopwatch.h"

namespace distill {

Teacher::Teacher(Device& device, Transformer& model, std::int64_t real_vocabulary, std::int64_t most_tokens,
                 std::int64_t most_supervised)
    : device_(device),
      model_(model),
      columns_(head_columns(real_vocabulary, model.spec().vocabulary)),
      batch_(device, most_tokens, most_supervised) {}

void Teacher::begin(const MicroBatch& batch) {
  hidden_ = model_.forward(batch_.upload(batch));
  next_ = 0;
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
  device_.synchronize();
  channel_->release();  // the teacher goes on while the loss is computed
  return logits;
}

void TeacherLoop::run(std::int64_t first_step, std::int64_t last_step) {
  for (std::int64_t step = first_step; step < last_step; ++step) {
    for (const MicroBatch& micro : data.step(step).micro) {
      teacher.begin(micro);
      sink.begin(micro);
      const std::int64_t count = std::int64_t(micro.supervised.size());
      for (std::int64_t first = 0; first < count; first += chunk) {
        const View slot = sink.acquire(std::min(chunk, count - first));
        if (!slot.data) return;  // the student has closed the channel
        if (payload == Payload::hidden)
          teacher.next_hidden(slot);
        else
          teacher.next_logits(slot);
        device.synchronize();
        sink.publish();
      }
    }
  }
}

}  // namespace distill
