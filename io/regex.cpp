#include "io/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <iterator>
#include <new>

#include "core/error.h"

namespace distill {

namespace {

// Text of 100 kB in one word stays far below both; a pattern that backtracks without end is stopped.
constexpr std::size_t first_stack_bytes = 32 * 1024, largest_stack_bytes = 16 * 1024 * 1024;
constexpr std::uint32_t match_limit = 50'000'000;

std::string describe(int error) {
  std::array<unsigned char, 256> message;
  pcre2_get_error_message(error, message.data(), message.size());
  return reinterpret_cast<const char*>(message.data());
}

bool is_general_category(std::string_view name) {
  constexpr std::string_view all[] = {"L",  "Lu", "Ll", "Lt", "Lm", "Lo", "M",  "Mn", "Mc", "Me", "N",  "Nd",
                                      "Nl", "No", "P",  "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "S",  "Sm",
                                      "Sc", "Sk", "So", "Z",  "Zs", "Zl", "Zp", "C",  "Cc", "Cf", "Co", "Cn"};
  return std::find(std::begin(all), std::end(all), name) != std::end(all);
}

// An escape that both engines read alike: its length. Otherwise 0.
std::size_t common_escape(std::string_view rest) {
  const char escaped = rest.size() > 1 ? rest[1] : '\0';
  if (escaped == 'p' || escaped == 'P') {
    const std::size_t close = rest.find('}');
    const bool named = close != rest.npos && rest[2] == '{' && is_general_category(rest.substr(3, close - 3));
    return named ? close + 1 : 0;
  }
  const bool known = std::string_view("sSdDrntfx").find(escaped) != std::string_view::npos;
  return known || !std::isalnum(static_cast<unsigned char>(escaped)) ? 2 : 0;
}

// The first construct that the two engines read differently, or that only one of them knows; empty if there is none.
std::string_view find_foreign_syntax(std::string_view pattern) {
  bool in_class = false;
  for (std::size_t at = 0; at < pattern.size();) {
    const std::string_view rest = pattern.substr(at);
    std::size_t length = 1;
    if (rest[0] == '\\') {
      length = common_escape(rest);
      if (length == 0) return rest.substr(0, rest.find('}') < 24 ? rest.find('}') + 1 : 2);
    } else if (in_class) {
      if (rest[0] == '[') return rest.substr(0, 1);          // a class in a class, or [:alpha:]
      if (rest.starts_with("&&")) return rest.substr(0, 2);  // intersection
      in_class = rest[0] != ']';
    } else if (rest[0] == '[') {
      in_class = true;
      if (rest.starts_with("[^")) length = 2;
      if (rest.substr(length).starts_with("]")) return rest.substr(0, length + 1);
    } else if (rest[0] == '{') {
      const std::size_t close = rest.find('}');
      if (rest.starts_with("{,")) return rest.substr(0, 2);
      if (close != rest.npos && rest.substr(close).starts_with("}+")) return rest.substr(0, close + 2);
    }
    at += length;
  }
  return {};
}

const std::string& checked(std::string_view pattern, const std::string& origin) {
  const std::string_view foreign = find_foreign_syntax(pattern);
  check_input(foreign.empty(), origin, ": \"", foreign,
              "\" is not supported in a pattern (its meaning differs between regular expression engines)");
  return origin;
}

}  // namespace

RegexScratch::RegexScratch()
    : match_(pcre2_match_data_create(1, nullptr)),
      context_(pcre2_match_context_create(nullptr)),
      stack_(pcre2_jit_stack_create(first_stack_bytes, largest_stack_bytes, nullptr)) {
  if (match_ == nullptr || context_ == nullptr || stack_ == nullptr) throw std::bad_alloc();
  pcre2_set_match_limit(context_, match_limit);
  pcre2_jit_stack_assign(context_, nullptr, stack_);
}

RegexScratch::~RegexScratch() {
  pcre2_match_data_free(match_);
  pcre2_match_context_free(context_);
  pcre2_jit_stack_free(stack_);
}

// Ruby's ^ and $ match at every line.
Regex::Regex(std::string_view pattern, const std::string& origin)
    : Regex(pattern, checked(pattern, origin), PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE) {}

Regex Regex::literal(std::string_view text) { return {text, "", PCRE2_UTF | PCRE2_LITERAL}; }

Regex Regex::unchecked(std::string_view pattern) { return {pattern, "", PCRE2_UTF | PCRE2_UCP}; }

Regex::Regex(std::string_view pattern, const std::string& origin, unsigned options) : origin_(origin) {
  int error = 0;
  std::size_t offset = 0;
  pcre2_code* code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), options, &error, &offset, nullptr);
  check_input(code != nullptr, origin, ": bad regular expression at character ", offset + 1, ": ", describe(error));
  compiled_ = pcre2_jit_compile(code, PCRE2_JIT_COMPLETE) == 0;
  code_.reset(code, pcre2_code_free);
}

Regex::Match Regex::find(RegexScratch& scratch, std::string_view text, std::size_t from) const {
  const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const int found =
      compiled_
          ? pcre2_jit_match(code_.get(), subject, text.size(), from, 0, scratch.match_, scratch.context_)
          : pcre2_match(code_.get(), subject, text.size(), from, PCRE2_NO_UTF_CHECK, scratch.match_, scratch.context_);
  if (found == PCRE2_ERROR_NOMATCH) return {std::string_view::npos, std::string_view::npos};
  check_input(found >= 0, origin_, ": matching a text of ", text.size(), " bytes failed: ", describe(found));
  const std::size_t* ends = pcre2_get_ovector_pointer(scratch.match_);
  return {ends[0], ends[1]};
}

}  // namespace distill
