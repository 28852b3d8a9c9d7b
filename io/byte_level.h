// The alphabet of byte-level tokenizers: tokens are written with one printable character per byte, so that a vocabulary
// of any bytes is readable text (space is Ġ, line feed is Ċ …).
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace distill {

// The bytes that a token's text stands for; nothing if it has a character outside of the alphabet.
std::optional<std::string> bytes_of_token(std::string_view token);

}  // namespace distill
