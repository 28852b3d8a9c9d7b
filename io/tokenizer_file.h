// A Hugging Face tokenizer.json, read and checked: what it says, as plain values. What byte-level BPE does not use, or
// what is not supported, is an input error that names file and field.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace distill {

struct AddedToken {
  std::int32_t id = 0;
  std::string content;
  bool single_word = false;  // only where no word character touches it
  bool lstrip = false;       // takes the white space on its left
  bool rstrip = false;       // … and on its right
  bool normalized = false;   // looked for in normalised text
  bool special = false;      // left out by decode when asked
  bool operator==(const AddedToken&) const = default;
};

// One step of the pre-tokenizer: cuts each piece of text where a pattern matches.
struct SplitStep {
  enum class Pattern { regex, literal, numeric };
  enum class Behavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };
  Pattern kind = Pattern::regex;
  std::string pattern;  // of regex and literal
  Behavior behavior = Behavior::isolated;
  bool invert = false;
  std::string field;  // where the file says so: for messages, and no part of what the step does
  bool operator==(const SplitStep& other) const {
    return kind == other.kind && pattern == other.pattern && behavior == other.behavior && invert == other.invert;
  }
};

struct MergeRule {
  std::int32_t left, right, result;  // ids
  bool operator==(const MergeRule&) const = default;
};

struct TokenizerFile {
  std::string path;
  bool nfc = false;                         // the normalizer: Unicode NFC or none
  std::vector<SplitStep> splits;            // before the prefix space
  bool add_prefix_space = false;            // to each piece that does not start with a space
  std::vector<SplitStep> byte_level_split;  // after it: GPT-2's pattern, or nothing
  bool ignore_merges = false;               // a word that is a token is that token, whatever the merges say
  std::optional<std::int32_t> unknown;      // token for bytes that the vocabulary lacks; without it they vanish
  bool fuse_unknown = false;
  std::vector<std::optional<std::string>> tokens;  // of the model by id, as written in the file
  std::vector<MergeRule> merges;                   // first to last
  std::vector<AddedToken> added_tokens;
};

TokenizerFile read_tokenizer_file(const std::string& path);

}  // namespace distill
