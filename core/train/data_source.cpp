#include "core/train/data_source.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "core/error.h"

namespace distill {

namespace {

// Sum of the `count` largest sizes: no choice of `count` samples has more.
std::int64_t sum_of_largest(std::vector<std::int64_t> sizes, int count) {
  const auto middle = sizes.begin() + std::min(std::ptrdiff_t(count), std::ptrdiff_t(sizes.size()));
  std::partial_sort(sizes.begin(), middle, sizes.end(), std::greater<>());
  std::int64_t sum = 0;
  for (auto size = sizes.begin(); size != middle; ++size) sum += *size;
  return sum;
}

}  // namespace

DataPlan validation_plan(int infer_batch_size, int dp_size, int dp_rank, Layout layout, int row_multiple) {
  DataPlan plan;
  plan.shape = {.per_device = infer_batch_size, .accumulation = 1, .dp_size = dp_size};
  plan.dp_rank = dp_rank;
  plan.layout = layout;
  plan.row_multiple = row_multiple;
  plan.last = LastBatch::keep;
  plan.shuffle = false;
  return plan;
}

EncodedDataSource::EncodedDataSource(Samples samples, const DataPlan& plan)
    : samples_(std::move(samples)),
      plan_(plan),
      order_(samples_.size(), plan.shape.global(), plan.last, plan.seed, plan.shuffle) {
  const BatchShape& shape = plan.shape;
  check_input(order_.steps_per_epoch() > 0, "the data has ", samples_.size(),
              " usable records, fewer than one global batch of ", shape.global(), " = per_device_train_batch_size ",
              shape.per_device, " x gradient_accumulation_steps ", shape.accumulation, " x ", shape.dp_size,
              " data-parallel ranks");
  std::vector<std::int64_t> lengths, supervised;
  for (std::int64_t i = 0; i < samples_.size(); ++i) {
    lengths.push_back(std::int64_t(samples_[i].tokens.size()));
    supervised.push_back(samples_[i].supervised());
  }
  most_supervised_ = sum_of_largest(std::move(supervised), shape.per_device);
  most_tokens_ = plan.layout == Layout::packed ? sum_of_largest(std::move(lengths), shape.per_device)
                                               : *std::max_element(lengths.begin(), lengths.end()) *
                                                     std::min<std::int64_t>(shape.per_device, samples_.size());
  most_tokens_ = (most_tokens_ + plan.row_multiple - 1) / plan.row_multiple * plan.row_multiple;
}

std::vector<std::int32_t> EncodedDataSource::dealt(std::vector<std::int32_t> indices) const {
  if (!plan_.balance) return indices;
  std::vector<std::int64_t> work;
  for (const std::int32_t i : indices) work.push_back((*plan_.balance)(std::int64_t(samples_[i].tokens.size())));
  return balanced_order(indices, work, plan_.shape);
}

StepBatch EncodedDataSource::step(std::int64_t step) const {
  const std::vector<std::int32_t> indices = dealt(order_.step_samples(step));
  StepBatch batch;
  for (int m = 0; m < plan_.shape.accumulation; ++m) {
    const std::span<const std::int32_t> mine = plan_.shape.cut(indices, m, plan_.dp_rank);
    if (!mine.empty()) batch.micro.push_back(assemble(samples_, mine, plan_.layout, plan_.row_multiple));
  }
  for (const std::int32_t i : indices) {
    const SampleView sample = samples_[i];
    batch.global_supervised += sample.supervised();
    batch.global_tokens += std::int64_t(sample.tokens.size());
  }
  batch.global_samples = std::int64_t(indices.size());
  batch.epoch = double(step + 1) / double(order_.steps_per_epoch());
  return batch;
}

}  // namespace distill
