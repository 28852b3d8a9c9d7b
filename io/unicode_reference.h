// Unicode as the reference library knows it. PCRE2 and utf8proc bring the Unicode version of the system; the reference
// has its own, older or newer ones, and token ids depend on them for a few thousand rare characters.
#pragma once

#include <string>
#include <string_view>

namespace distill {

// The text for regular expressions to look at: characters whose category this PCRE2 may see otherwise are replaced by
// others of the same length, so positions stay. Returns the text itself when there are none, else `buffer`.
std::string_view with_reference_categories(std::string_view text, std::string& buffer);

// Unicode normalisation form C of valid UTF-8. Returns the text itself where that is known to be normal, else `buffer`.
std::string_view to_nfc(std::string_view text, std::string& buffer);

}  // namespace distill
