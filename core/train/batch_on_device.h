// Copies micro-batches to the device, into memory that is reserved once.
#pragma once

#include "core/model/transformer.h"
#include "core/train/data_source.h"

namespace distill {

class BatchOnDevice {
 public:
  // Bounds over all micro-batches to come.
  BatchOnDevice(Device& device, std::int64_t most_tokens, std::int64_t most_supervised);

  // Valid until the next upload.
  const DeviceBatch& upload(const MicroBatch& batch);
  const DeviceBatch& batch() const { return batch_; }
  ConstView labels() const { return labels_; }  // i32 [1, C]

 private:
  ConstView copy(Tensor& to, const std::vector<std::int32_t>& from);

  Device& device_;
  Tensor tokens_, positions_, offsets_, supervised_, label_memory_;
  DeviceBatch batch_;
  ConstView labels_;
};

}  // namespace distill
