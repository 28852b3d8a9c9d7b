// Encoded records, flat: what the data source cuts into batches. Flat arrays, so that the ranks of a node can share
// them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace distill {

// One sequence. Its labels are the tokens from prompt_length on (0 when the prompt is distilled too).
struct SampleView {
  std::span<const std::int32_t> tokens;
  std::int32_t prompt_length = 0;

  // Supervised positions are [first_supervised(), tokens.size() − 1): the next token is a label of the same sequence.
  std::int64_t first_supervised() const { return prompt_length > 0 ? prompt_length - 1 : 0; }
  std::int64_t supervised() const {
    const std::int64_t count = std::int64_t(tokens.size()) - 1 - first_supervised();
    return count > 0 ? count : 0;
  }
};

struct Samples {
  std::vector<std::int32_t> tokens;          // of all samples, one after the other
  std::vector<std::int64_t> offsets{0};      // sample i is tokens [offsets[i], offsets[i + 1])
  std::vector<std::int32_t> prompt_lengths;  // per sample

  std::int64_t size() const { return std::int64_t(prompt_lengths.size()); }
  SampleView operator[](std::int64_t i) const {
    const std::span<const std::int32_t> all(tokens);
    return {all.subspan(std::size_t(offsets[i]), std::size_t(offsets[i + 1] - offsets[i])), prompt_lengths[i]};
  }
  void add(std::span<const std::int32_t> sample, std::int32_t prompt_length) {
    tokens.insert(tokens.end(), sample.begin(), sample.end());
    offsets.push_back(std::int64_t(tokens.size()));
    prompt_lengths.push_back(prompt_length);
  }
};

}  // namespace distill
