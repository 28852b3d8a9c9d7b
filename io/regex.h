// A regular expression of a tokenizer.json, matched by PCRE2 as the reference library's engine (Oniguruma, Ruby syntax)
// would. The two agree on the syntax that tokenizers use; a pattern with anything else is refused, not guessed at.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

extern "C" {
struct pcre2_real_code_8;
struct pcre2_real_match_data_8;
struct pcre2_real_match_context_8;
struct pcre2_real_jit_stack_8;
}

namespace distill {

// What a match needs besides the pattern; one for each thread.
class RegexScratch {
 public:
  RegexScratch();
  ~RegexScratch();
  RegexScratch(const RegexScratch&) = delete;
  RegexScratch& operator=(const RegexScratch&) = delete;

 private:
  friend class Regex;
  pcre2_real_match_data_8* match_;
  pcre2_real_match_context_8* context_;
  pcre2_real_jit_stack_8* stack_;
};

class Regex {
 public:
  struct Match {
    std::size_t begin, end;
  };

  // `origin` (file and field) starts the message when the pattern is refused.
  Regex(std::string_view pattern, const std::string& origin);
  // Matches exactly this text.
  static Regex literal(std::string_view text);
  // With PCRE2's own meaning of everything.
  static Regex unchecked(std::string_view pattern);

  // The first match in valid UTF-8 that starts at or after `from`; begin == npos when there is none.
  Match find(RegexScratch& scratch, std::string_view text, std::size_t from) const;

 private:
  Regex(std::string_view pattern, const std::string& origin, unsigned options);

  std::shared_ptr<const pcre2_real_code_8> code_;
  std::string origin_;
  bool compiled_;  // to machine code
};

}  // namespace distill
