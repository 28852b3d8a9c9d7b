// Cuts text into the words that byte-pair encoding works on: the steps of the tokenizer.json, one after the other.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "io/regex.h"
#include "io/tokenizer_file.h"

namespace distill {

// What a thread needs to cut text; reused from call to call.
struct PreTokenizerScratch {
  struct Piece {
    std::size_t begin, end;
  };
  struct Match {
    std::size_t begin, end;
    bool matched;  // or what lies between two matches
  };
  RegexScratch regex;
  std::vector<Piece> pieces, next;
  std::vector<Match> matches;
  std::string categories, prefixed;  // text behind views
};

class PreTokenizer {
 public:
  explicit PreTokenizer(const TokenizerFile& file);

  // The words of valid UTF-8 are scratch.pieces of the text returned: the given one, or one with spaces put in. It is
  // valid until the next call.
  std::string_view cut(std::string_view text, PreTokenizerScratch& scratch) const;

 private:
  struct Step {
    Regex regex;
    SplitStep::Behavior behavior;
    bool invert;
    bool numeric;  // looks at the text itself, not at its reference categories
  };

  static Step make_step(const SplitStep& step, const std::string& path);
  static void apply(const Step& step, std::string_view text, PreTokenizerScratch& scratch);

  std::vector<Step> splits_, byte_level_split_;
  bool add_prefix_space_;
};

}  // namespace distill
