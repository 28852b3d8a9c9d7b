#include "core/train/batch_on_device.h"

namespace distill {

BatchOnDevice::BatchOnDevice(Device& device, std::int64_t most_tokens, std::int64_t most_supervised)
    : device_(device),
      tokens_(device.tensor(1, most_tokens, DType::i32)),
      positions_(device.tensor(1, most_tokens, DType::i32)),
      offsets_(device.tensor(1, most_tokens + 1, DType::i32)),
      supervised_(device.tensor(1, most_supervised, DType::i32)),
      label_memory_(device.tensor(1, most_supervised, DType::i32)) {}

ConstView BatchOnDevice::copy(Tensor& to, const std::vector<std::int32_t>& from) {
  const View view = to.view().col_slice(0, std::int64_t(from.size()));
  device_.upload(view, from.data());
  return view;
}

const DeviceBatch& BatchOnDevice::upload(const MicroBatch& batch) {
  batch_.tokens = copy(tokens_, batch.tokens);
  batch_.positions = copy(positions_, batch.positions);
  batch_.segments = {copy(offsets_, batch.offsets), int(batch.longest)};
  batch_.supervised = copy(supervised_, batch.supervised);
  labels_ = copy(label_memory_, batch.labels);
  return batch_;
}

}  // namespace distill
