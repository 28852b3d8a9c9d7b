// Encoded records, flat: what the data source cuts into batches. Flat arrays, so that the ranks of a node can share
// them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "core/error.h"

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

// Read-only and cheap to copy: copies see the same memory and keep it alive, whoever made it (SampleBuilder, or another
// rank of this node).
class Samples {
 public:
  Samples() = default;
  // Sample i is tokens [offsets[i], offsets[i + 1]); one offset more than prompt lengths. They live as long as owner.
  Samples(std::span<const std::int32_t> tokens, std::span<const std::int64_t> offsets,
          std::span<const std::int32_t> prompt_lengths, std::shared_ptr<const void> owner)
      : tokens_(tokens), offsets_(offsets), prompt_lengths_(prompt_lengths), owner_(std::move(owner)) {
    check(offsets.size() == prompt_lengths.size() + 1, offsets.size(), " offsets of ", prompt_lengths.size(),
          " samples");
  }

  std::int64_t size() const { return std::int64_t(prompt_lengths_.size()); }
  SampleView operator[](std::int64_t i) const {
    const std::size_t s(i), begin(offsets_[s]), end(offsets_[s + 1]);
    return {tokens_.subspan(begin, end - begin), prompt_lengths_[s]};
  }
  std::span<const std::int32_t> tokens() const { return tokens_; }  // of all samples, one after the other
  std::span<const std::int64_t> offsets() const { return offsets_; }
  std::span<const std::int32_t> prompt_lengths() const { return prompt_lengths_; }

 private:
  std::span<const std::int32_t> tokens_;
  std::span<const std::int64_t> offsets_;
  std::span<const std::int32_t> prompt_lengths_;
  std::shared_ptr<const void> owner_;
};

// Samples one after the other, on the heap.
class SampleBuilder {
 public:
  void add(std::span<const std::int32_t> sample, std::int32_t prompt_length) {
    tokens_.insert(tokens_.end(), sample.begin(), sample.end());
    offsets_.push_back(std::int64_t(tokens_.size()));
    prompt_lengths_.push_back(prompt_length);
  }
  void reserve(std::size_t samples, std::size_t tokens) {
    tokens_.reserve(tokens);
    offsets_.reserve(samples + 1);
    prompt_lengths_.reserve(samples);
  }
  Samples finish() && {
    const auto owner = std::make_shared<const SampleBuilder>(std::move(*this));
    return {owner->tokens_, owner->offsets_, owner->prompt_lengths_, owner};
  }

 private:
  std::vector<std::int32_t> tokens_;
  std::vector<std::int64_t> offsets_{0};
  std::vector<std::int32_t> prompt_lengths_;
};

}  // namespace distill
