#include "io/unicode_reference.h"

#include <utf8proc.h>

#include <algorithm>
#include <iterator>
#include <vector>

#include "core/error.h"
#include "io/unicode_reference_tables.h"
#include "io/utf8.h"

namespace distill {

namespace {

constexpr auto nfc_options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);

// The range of a sorted table that holds the code point, or null.
template <class Range, std::size_t n>
const Range* find_range(const Range (&table)[n], char32_t code_point) {
  const Range* range = std::lower_bound(std::begin(table), std::end(table), code_point,
                                        [](const Range& r, char32_t c) { return r.last < c; });
  return range != std::end(table) && range->first <= code_point ? range : nullptr;
}

// The position of the first byte that is at least `lead`, or the size.
std::size_t find_lead_from(std::string_view text, std::size_t at, unsigned char lead) {
  while (at < text.size() && static_cast<unsigned char>(text[at]) < lead) ++at;
  return at;
}

unsigned char first_byte(char32_t code_point) {
  std::string encoded;
  append_utf8(encoded, code_point);
  return static_cast<unsigned char>(encoded[0]);
}

// Decomposed code points of the text, marks in canonical order. (utf8proc_decompose orders them too, but takes
// quadratic time for long runs of marks.)
std::vector<utf8proc_int32_t> decompose(std::string_view text) {
  std::vector<utf8proc_int32_t> code_points;
  code_points.reserve(text.size());
  for (std::size_t at = 0; at < text.size(); at += utf8_length(text[at])) {
    utf8proc_int32_t parts[8];  // no canonical decomposition has more than 4
    int boundary = 0;
    const auto code_point = static_cast<utf8proc_int32_t>(code_point_at(text, at));
    const utf8proc_ssize_t count = utf8proc_decompose_char(code_point, parts, std::size(parts), nfc_options, &boundary);
    check(count >= 0 && count <= std::ssize(parts), "normalisation of code point ", code_point, ": ",
          utf8proc_errmsg(count));
    code_points.insert(code_points.end(), parts, parts + count);
  }
  const auto combining_class = [](utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; };
  const auto is_mark = [&](utf8proc_int32_t c) { return combining_class(c) != 0; };
  for (auto mark = code_points.begin(); mark != code_points.end();) {
    mark = std::find_if(mark, code_points.end(), is_mark);
    const auto end = std::find_if_not(mark, code_points.end(), is_mark);
    std::stable_sort(mark, end, [&](auto a, auto b) { return combining_class(a) < combining_class(b); });
    mark = end;
  }
  return code_points;
}

// Appends the normal form of a text without unknown characters.
void append_nfc(std::string_view text, std::string& normal) {
  std::vector<utf8proc_int32_t> code_points = decompose(text);
  const utf8proc_ssize_t length = utf8proc_normalize_utf32(code_points.data(), std::ssize(code_points), nfc_options);
  check(length >= 0, "normalisation of text: ", utf8proc_errmsg(length));
  for (utf8proc_ssize_t i = 0; i < length; ++i)
    append_utf8(normal, static_cast<char32_t>(code_points[static_cast<std::size_t>(i)]));
}

}  // namespace

std::string_view with_reference_categories(std::string_view text, std::string& buffer) {
  static const unsigned char first_lead = first_byte(category_stand_ins[0].first);
  bool changed = false;
  for (std::size_t at = 0; (at = find_lead_from(text, at, first_lead)) < text.size();) {
    const std::size_t length = utf8_length(text[at]);
    const StandIn* found = find_range(category_stand_ins, code_point_at(text, at));
    if (found != nullptr) {
      if (!changed) buffer = text;
      changed = true;
      std::string stand_in;
      append_utf8(stand_in, found->stand_in);
      buffer.replace(at, length, stand_in);
    }
    at += length;
  }
  return changed ? std::string_view(buffer) : text;
}

std::string_view to_nfc(std::string_view text, std::string& buffer) {
  // Nothing below U+0300 changes or combines with its left neighbour.
  if (find_lead_from(text, 0, first_byte(0x300)) == text.size()) return text;
  buffer.clear();
  // Unknown characters stay as they are and keep their neighbours apart.
  std::size_t done = 0;
  static const unsigned char first_lead = first_byte(unknown_to_nfc[0].first);
  for (std::size_t at = 0; (at = find_lead_from(text, at, first_lead)) < text.size();) {
    const std::size_t length = utf8_length(text[at]);
    if (find_range(unknown_to_nfc, code_point_at(text, at)) != nullptr) {
      append_nfc(text.substr(done, at - done), buffer);
      buffer.append(text, at, length);
      done = at + length;
    }
    at += length;
  }
  append_nfc(text.substr(done), buffer);
  return buffer;
}

}  // namespace distill
