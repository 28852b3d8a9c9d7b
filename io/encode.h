// Records to token sequences: the conversation of a record is rendered by a chat template, encoded, and cut at the
// sequence length; labels are the tokens after the rendered prompt (README.md, "From a record to tokens").
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/train/samples.h"
#include "io/message.h"
#include "io/records.h"

namespace distill {

// Both are called from several threads at once. RenderChat ends with the start of the assistant's turn if asked to.
using EncodeText = std::function<std::vector<std::int32_t>(std::string_view)>;
using RenderChat = std::function<std::string(std::span<const Message>, bool add_generation_prompt)>;

struct EncodeOptions {
  std::int64_t sequence_length = 2048;
  bool distill_on_prompt = false;
  int threads = 1;
  // Called from the calling thread every now and then, and at the end with done == total.
  std::function<void(std::int64_t done, std::int64_t total)> progress = {};
};

struct EncodedRecords {
  Samples samples;             // in the order of the records
  std::int64_t truncated = 0;  // records longer than the sequence length
  std::int64_t left_out = 0;   // records without a supervised position, after truncation
};

// The result does not depend on the number of threads.
EncodedRecords encode_records(const std::vector<Record>& records, const EncodeText& encode, const RenderChat& render,
                              const EncodeOptions& options);

}  // namespace distill
