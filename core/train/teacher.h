// The teacher: forward only. On a rank of its own it feeds the logits channel; with one rank it runs in turn with the
// student.
#pragma once

#include <memory>

#include "core/model/transformer.h"
#include "core/train/batch_on_device.h"
#include "core/train/logits_channel.h"
#include "core/train/payload_choice.h"

namespace distill {

// The teacher's logits of a micro-batch's supervised positions, chunk by chunk in the teacher's own type: the same
// products of the same shapes wherever the teacher runs, hence the same bits.
class Teacher {
 public:
  Teacher(Device& device, Transformer& model, std::int64_t real_vocabulary, std::int64_t most_tokens,
          std::int64_t most_supervised);

  std::int64_t columns() const { return columns_; }
  void begin(const MicroBatch& batch);
  // logits [n, columns] of the next n supervised positions.
  void next_logits(View logits);
  // Their hidden states [n, H] after the final norm instead, in the teacher's type.
  void next_hidden(View hidden);

 private:
  Device& device_;
  Transformer& model_;
  std::int64_t columns_;
  BatchOnDevice batch_;
  View hidden_;
  std::int64_t next_ = 0;
};

// Teacher and student in one process, in turn.
class LocalTeacher : public TeacherSource {
 public:
  LocalTeacher(Device& device, Teacher& teacher, DType dtype, std::int64_t chunk);

  void begin(const MicroBatch& batch) override;
  ConstView acquire(std::int64_t positions) override;
  void release() override {}
  double seconds_waited() const override { return seconds_; }

 private:
  Device& device_;
  Teacher& teacher_;
  Tensor logits_;       // [chunk, columns]
  double seconds_ = 0;  // the teacher's own work: what the student waits for when they take turns
};

// Payload `hidden`: takes hidden states from a channel and forms the logits here, with the teacher's head. The same
// product of the same shapes as the teacher's own, hence the same bits.
class HiddenTeacherSource : public TeacherSource {
 public:
  // channel: chunks [n, H] in the type of head. head [columns, H]: the rows that Teacher::next_logits multiplies with.
  HiddenTeacherSource(Device& device, std::unique_ptr<TeacherSource> channel, Tensor head, std::int64_t chunk);

  void begin(const MicroBatch& batch) override { channel_->begin(batch); }
  ConstView acquire(std::int64_t positions) override;
  void release() override {}
  double seconds_waited() const override { return channel_->seconds_waited(); }
  std::int64_t bytes_moved() const override { return channel_->bytes_moved(); }

 private:
  Device& device_;
  std::unique_ptr<TeacherSource> channel_;
  Tensor head_, logits_;  // [columns, H], [chunk, columns]
};

// The whole job of a teacher rank: logits (or hidden states) of steps [first_step, last_step) into the channel. Ends
// early when the student closes the channel.
struct TeacherLoop {
  Device& device;
  Teacher& teacher;
  const DataSource& data;
  LogitsSink& sink;
  std::int64_t chunk;
  Payload payload = Payload::logits;

  void run(std::int64_t first_step, std::int64_t last_step);
};

}  // namespace distill
