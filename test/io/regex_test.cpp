#include "io/regex.h"

#include <catch2/catch.hpp>
#include <string>

#include "core/error.h"
#include "test/support/refusal.h"

using namespace distill;
using distill::test::refusal;

namespace {

std::string complaint(const std::string& pattern) {
  return refusal("", [&] { Regex(pattern, "f: field"); });
}

// "begin-end" of the first match.
std::string first(const std::string& pattern, const std::string& text, std::size_t from = 0) {
  RegexScratch scratch;
  const Regex::Match match = Regex(pattern, "f").find(scratch, text, from);
  return match.begin == std::string::npos ? "none" : std::to_string(match.begin) + "-" + std::to_string(match.end);
}

}  // namespace

TEST_CASE("patterns match by Unicode properties", "[regex]") {
  CHECK(first(R"(\p{L}+)", "1 éà日x!") == "2-10");
  CHECK(first(R"(\p{L}+)", "a b", 1) == "2-3");
  CHECK(first(R"(\s)", "a\u3000b") == "1-4");
  CHECK(first(R"((?i:'s))", "IT'S") == "2-4");
  CHECK(first(R"((?i:'s))", "it'\u017f") == "2-5");
  CHECK(first("b$", "ab\nc") == "1-2");  // at the end of every line, as in Ruby
  CHECK(first("^c", "ab\nc") == "3-4");
  CHECK(first("x", "abc") == "none");
}

TEST_CASE("literal text is matched as it is", "[regex]") {
  RegexScratch scratch;
  CHECK(Regex::literal(".*").find(scratch, "a.*", 0).begin == 1);
  CHECK(Regex::literal(".*").find(scratch, "abc", 0).begin == std::string::npos);
}

TEST_CASE("what engines read differently is refused", "[regex]") {
  const auto named = [](const std::string& construct) {
    return "f: field: \"" + construct +
           "\" is not supported in a pattern (its meaning differs between regular expression engines)";
  };
  CHECK(complaint(R"(a|\w+)") == named(R"(\w)"));
  CHECK(complaint(R"(\bx)") == named(R"(\b)"));
  CHECK(complaint(R"([a\h])") == named(R"(\h)"));
  CHECK(complaint(R"((a)\1)") == named(R"(\1)"));
  CHECK(complaint(R"(\p{Han}+)") == named(R"(\p{Han})"));
  CHECK(complaint(R"(\p{^L}+)") == named(R"(\p{^L})"));
  CHECK(complaint(R"(\pL)") == named(R"(\p)"));
  CHECK(complaint(R"(\p{L)") == named(R"(\p)"));
  CHECK(complaint(R"([a-z&&[^b]])") == named("&&"));
  CHECK(complaint(R"([^[:alpha:]])") == named("["));
  CHECK(complaint(R"([]a])") == named("[]"));
  CHECK(complaint(R"([^]a])") == named("[^]"));
  CHECK(complaint(R"(\p{N}{1,3}+)") == named("{1,3}+"));
  CHECK(complaint(R"(a{,3})") == named("{,"));
  CHECK(complaint("a\\") == "f: field: bad regular expression at character 3: \\ at end of pattern");
  CHECK(complaint(R"(\p{Lu}\P{N}[\]\[&-]\x{41}\x41\.(?:a)(?=b)(?!c)(?<=d)(?<!e)(?>f)g++h*?[^\r\n]{2,})") == "no error");
}

TEST_CASE("a pattern that cannot be compiled is an input error", "[regex]") {
  CHECK(complaint("a(b") == "f: field: bad regular expression at character 4: missing closing parenthesis");
  CHECK(complaint("\xff").substr(0, 44) == "f: field: bad regular expression at characte");
}

TEST_CASE("a pattern that backtracks without end is stopped", "[regex]") {
  const std::string text(100, 'a');
  CHECK(refusal("", [&] {
          RegexScratch scratch;
          Regex("(a+)+$|(a*)*b", "f: field").find(scratch, text + "!", 0);
        }) == "f: field: matching a text of 101 bytes failed: match limit exceeded");
}
