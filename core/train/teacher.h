// The teacher: forward only. On a rank of its own it feeds the logits channel; with one rank it runs in turn with the
// student.
#pragma once

#include <memory>

#include "core/model/transformer.h"
#include "core/train/batch_on_device.h"
#include "core/train/logits_channel.h"
#include "core/train/payload_choice.h"
#include "core/train/pipeline.h"
#include "core/train/validation.h"

namespace distill {

// A stage of the teacher, which on the last one gives the logits of a micro-batch's supervised positions, chunk by
// chunk in the teacher's own type: the same products of the same shapes wherever the teacher runs, hence the same bits.
class Teacher {
 public:
  Teacher(Device& device, Transformer& model, std::int64_t real_vocabulary, std::int64_t most_tokens,
          std::int64_t most_supervised);

  Transformer& model() { return model_; }
  std::int64_t columns() const { return columns_; }  // of this tensor-parallel rank
  // The forward of micro-batch m; returns what the next stage gets.
  View begin(const MicroBatch& batch, int m = 0);
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
  double teacher_seconds_waited() const override { return channel_->teacher_seconds_waited(); }
  std::int64_t bytes_moved() const override { return channel_->bytes_moved(); }

 private:
  Device& device_;
  std::unique_ptr<TeacherSource> channel_;
  Tensor head_, logits_;  // [columns, H], [chunk, columns]
};

// The whole job of a teacher rank: the forward of steps [first_step, last_step) and of the validations between them, as
// a stage of its pipeline; the last stage puts logits or hidden states into the channel. Ends early when the student
// closes the channel: tensor-parallel ranks agree on that before every micro-batch, and a stage starts one only when
// the next stage has asked for it.
class TeacherLoop {
 public:
  // sink: null on all but the last stage.
  TeacherLoop(Device& device, Teacher& teacher, const DataSource& data, LogitsSink* sink, std::int64_t chunk,
              Payload payload, Communicator& pp_forward, Communicator& pp_backward);
  void run(std::int64_t first_step, std::int64_t last_step, const Validation& validation = {});

 private:
  bool is_wanted();
  void ask(bool wanted);
  void expect(const MicroBatch* micro, int m);
  bool feed(const MicroBatch& micro);

  Device& device_;
  Teacher& teacher_;
  const DataSource& data_;
  LogitsSink* sink_;
  std::int64_t chunk_;
  Payload payload_;
  Communicator& pp_backward_;
  PipelineLinks links_;
  bool is_closed_ = false;  // this rank's student wants no more
};

}  // namespace distill
