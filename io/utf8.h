// UTF-8 at the level of code points.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace distill {

// Bytes of the code point that starts with this byte, in valid UTF-8.
inline std::size_t utf8_length(char lead) {
  const auto byte = static_cast<unsigned char>(lead);
  return byte < 0x80 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
}

// The code point at `at` of valid UTF-8.
char32_t code_point_at(std::string_view text, std::size_t at);

// Bytes at the start of `text` that are valid UTF-8 (all of them if it is valid). Surrogates are not.
std::size_t valid_utf8_prefix(std::string_view text);

// Valid UTF-8 without the code points that Unicode calls no characters (U+FFFE, U+FFFF, …): what a YAML file can hold.
bool is_utf8_text(std::string_view bytes);

// Each longest piece that could have started a character, and each other byte out of place, becomes one U+FFFD: the
// rule of the Unicode standard that Python and Rust follow.
std::string replace_invalid_utf8(std::string_view bytes);

void append_utf8(std::string& text, char32_t code_point);

}  // namespace distill
