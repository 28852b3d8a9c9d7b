#include "core/train/micro_batch.h"

#include <algorithm>

#include "core/error.h"

namespace distill {

namespace {

// Any id that the embedding has: no real token ever sees it.
constexpr std::int32_t padding_id = 0;

void append(MicroBatch& batch, const SampleView& sample, std::int64_t rows) {
  const auto begin = std::int32_t(batch.tokens.size());
  const auto length = std::int32_t(sample.tokens.size());
  batch.tokens.insert(batch.tokens.end(), sample.tokens.begin(), sample.tokens.end());
  batch.tokens.resize(std::size_t(begin + rows), padding_id);
  for (std::int32_t t = 0; t < rows; ++t) batch.positions.push_back(t);
  for (auto t = std::int32_t(sample.first_supervised()); t + 1 < length; ++t) {
    batch.supervised.push_back(begin + t);
    batch.labels.push_back(sample.tokens[std::size_t(t) + 1]);
  }
  batch.offsets.push_back(std::int32_t(begin + rows));
  batch.real_tokens += length;
}

}  // namespace

MicroBatch assemble(const Samples& samples, std::span<const std::int32_t> indices, Layout layout, int row_multiple) {
  std::int64_t longest = 0, total = 0;
  for (const std::int32_t i : indices) {
    const auto length = std::int64_t(samples[i].tokens.size());
    longest = std::max(longest, length);
    total += length;
  }
  if (layout == Layout::padded) total = longest * std::int64_t(indices.size());
  check(total <= INT32_MAX - row_multiple, "a micro-batch of ", total, " tokens");

  MicroBatch batch;
  const std::int64_t filling = (row_multiple - total % row_multiple) % row_multiple;
  batch.longest = std::int32_t(std::max(longest, filling));
  batch.tokens.reserve(std::size_t(total));
  batch.positions.reserve(std::size_t(total));
  for (const std::int32_t i : indices) {
    const SampleView sample = samples[i];
    append(batch, sample, layout == Layout::padded ? longest : std::int64_t(sample.tokens.size()));
  }
  if (filling > 0) append(batch, SampleView{}, filling);
  return batch;
}

}  // namespace distill
