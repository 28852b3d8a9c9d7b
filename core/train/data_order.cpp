#include "core/train/data_order.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "core/error.h"

namespace distill {

namespace {

constexpr std::uint64_t golden_gamma = 0x9e3779b97f4a7c15;

constexpr std::uint64_t split_mix(std::uint64_t x) {
  x += golden_gamma;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

std::vector<std::int32_t> epoch_order(std::int64_t samples, std::uint64_t seed, std::int64_t epoch, bool shuffle) {
  check(samples >= 0 && samples <= INT32_MAX, "an epoch of ", samples, " samples");
  std::vector<std::int32_t> order(static_cast<std::size_t>(samples));
  std::iota(order.begin(), order.end(), 0);
  if (!shuffle) return order;
  const std::uint64_t key = split_mix(split_mix(seed) + std::uint64_t(epoch));
  for (auto i = std::uint64_t(samples); i-- > 1;)
    std::swap(order[i], order[split_mix(key + i * golden_gamma) % (i + 1)]);
  return order;
}

std::span<const std::int32_t> BatchShape::cut(std::span<const std::int32_t> step_samples, int m, int dp_rank) const {
  check(m >= 0 && m < accumulation && dp_rank >= 0 && dp_rank < dp_size, "micro-batch ", m, " of ", accumulation,
        ", dp rank ", dp_rank, " of ", dp_size);
  const auto width = std::size_t(per_device);
  const std::size_t begin =
      std::min((std::size_t(m) * std::size_t(dp_size) + std::size_t(dp_rank)) * width, step_samples.size());
  return step_samples.subspan(begin, std::min(width, step_samples.size() - begin));
}

DataOrder::DataOrder(std::int64_t samples, std::int64_t global_batch, LastBatch last, std::uint64_t seed, bool shuffle)
    : samples_(samples), global_batch_(global_batch), seed_(seed), shuffle_(shuffle) {
  check(global_batch > 0, "a global batch of ", global_batch, " sequences");
  steps_per_epoch_ = (last == LastBatch::drop ? samples : samples + global_batch - 1) / global_batch;
}

std::vector<std::int32_t> DataOrder::step_samples(std::int64_t step) const {
  check(step >= 0 && steps_per_epoch_ > 0, "step ", step, " of data with ", steps_per_epoch_, " steps an epoch");
  const std::lock_guard lock(mutex_);
  if (const std::int64_t epoch = step / steps_per_epoch_; epoch != epoch_) {
    order_ = epoch_order(samples_, seed_, epoch, shuffle_);
    epoch_ = epoch;
  }
  const std::int64_t begin = step % steps_per_epoch_ * global_batch_;
  const std::int64_t end = std::min(begin + global_batch_, samples_);
  return {order_.begin() + begin, order_.begin() + end};
}

}  // namespace distill
