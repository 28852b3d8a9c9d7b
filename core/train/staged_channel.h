// The ends of a logits channel whose slots lie in host memory, for a device that has memory of its own: a copy each
// way.
#pragma once

#include <memory>

#include "core/device.h"
#include "core/train/logits_channel.h"

namespace distill {

// Chunks of `columns` in `dtype`, at most `positions` long, as those of `channel`.
class StagedSource final : public TeacherSource {
 public:
  StagedSource(Device& device, std::unique_ptr<TeacherSource> channel, std::int64_t positions, std::int64_t columns,
               DType dtype);

  void begin(const MicroBatch& batch) override { channel_->begin(batch); }
  ConstView acquire(std::int64_t positions) override;
  void release() override {}  // the slot is free again as soon as it was copied
  double seconds_waited() const override { return channel_->seconds_waited(); }
  double teacher_seconds_waited() const override { return channel_->teacher_seconds_waited(); }
  std::int64_t bytes_moved() const override { return channel_->bytes_moved(); }

 private:
  Device& device_;
  std::unique_ptr<TeacherSource> channel_;
  Tensor chunk_;
};

class StagedSink final : public LogitsSink {
 public:
  StagedSink(Device& device, std::unique_ptr<LogitsSink> channel, std::int64_t positions, std::int64_t columns,
             DType dtype);

  void begin(const MicroBatch& batch) override { channel_->begin(batch); }
  View acquire(std::int64_t positions) override;
  void publish() override;
  double seconds_waited() const override { return channel_->seconds_waited(); }

 private:
  Device& device_;
  std::unique_ptr<LogitsSink> channel_;
  Tensor chunk_;
  View slot_;  // host memory
};

}  // namespace distill
