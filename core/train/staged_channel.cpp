#include "core/train/staged_channel.h"

#include <utility>

namespace distill {

StagedSource::StagedSource(Device& device, std::unique_ptr<TeacherSource> channel, std::int64_t positions,
                           std::int64_t columns, DType dtype)
    : device_(device), channel_(std::move(channel)), chunk_(device.tensor(positions, columns, dtype)) {}

ConstView StagedSource::acquire(std::int64_t positions) {
  const ConstView slot = channel_->acquire(positions);
  const View chunk = chunk_.view().row_slice(0, positions);
  device_.upload(chunk, slot.data);
  channel_->release();
  return chunk;
}

StagedSink::StagedSink(Device& device, std::unique_ptr<LogitsSink> channel, std::int64_t positions,
                       std::int64_t columns, DType dtype)
    : device_(device), channel_(std::move(channel)), chunk_(device.tensor(positions, columns, dtype)) {}

View StagedSink::acquire(std::int64_t positions) {
  slot_ = channel_->acquire(positions);
  return slot_.data ? chunk_.view().row_slice(0, positions) : View();
}

void StagedSink::publish() {
  device_.download(slot_.mutable_data(), chunk_.view().row_slice(0, slot_.rows));
  channel_->publish();
}

}  // namespace distill
