#include "io/byte_level.h"

#include <array>
#include <cstddef>

#include "io/utf8.h"

namespace distill {

namespace {

constexpr int alphabet_end = 0x144;  // one past the largest character of the alphabet

// Byte of each character of the alphabet, −1 for other characters. Printable Latin-1 stands for itself, the other
// bytes, in order, for the characters from U+0100 on.
constexpr std::array<int, alphabet_end> make_alphabet() {
  std::array<int, alphabet_end> byte_of{};
  for (int& byte : byte_of) byte = -1;
  int next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xff && byte != 0xad);
    byte_of[printable ? static_cast<std::size_t>(byte) : static_cast<std::size_t>(next++)] = byte;
  }
  return byte_of;
}

constexpr std::array<int, alphabet_end> byte_of_character = make_alphabet();

}  // namespace

std::optional<std::string> bytes_of_token(std::string_view token) {
  std::string bytes;
  bytes.reserve(token.size());
  for (std::size_t at = 0; at < token.size(); at += utf8_length(token[at])) {
    const char32_t character = code_point_at(token, at);
    if (character >= alphabet_end || byte_of_character[character] < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(byte_of_character[character]));
  }
  return bytes;
}

}  // namespace distill
