#include "io/strict_json.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "core/error.h"
#include "io/mapped_file.h"

namespace distill {

namespace {

using nlohmann::json;

constexpr int deepest = 64;  // levels; model files have three or four

// Sees the parser's events and refuses what JSON allows but no writer of these files means.
class Strict {
 public:
  explicit Strict(const std::string& where) : where_(where) {}

  bool operator()(int depth, json::parse_event_t event, const json& value) {
    check_input(depth <= deepest, where_, ": nested deeper than ", deepest, " levels");
    if (event == json::parse_event_t::object_start) keys_.emplace_back();
    if (event == json::parse_event_t::object_end) keys_.pop_back();
    if (event == json::parse_event_t::key)
      check_input(keys_.back().insert(value.get_ref<const std::string&>()).second, where_, ": key ", shown(value),
                  " appears twice in one object");
    return true;
  }

 private:
  const std::string& where_;
  std::vector<std::set<std::string>> keys_;  // of the objects that are open
};

// "[json.exception.parse_error.101] parse error at line 1, column 3: syntax error …" → "line 1, column 3: …"
std::string reason(const json::parse_error& error) {
  const std::string message = error.what();
  constexpr std::string_view lead = "parse error at ";
  const std::size_t at = message.find(lead);
  return at == std::string::npos ? message : message.substr(at + lead.size());
}

// "[json.exception.out_of_range.406] number overflow parsing '1e999'" → "line 1, column 8: number overflow parsing …".
// The parser does not say where it was: at the first number beyond double, so at the first one written like this.
std::string reason(const json::out_of_range& error, std::string_view content) {
  const std::string_view message = error.what();
  const std::string_view what = message.substr(std::min(message.find("] ") + 2, message.size()));
  const std::size_t quote = std::min(what.find('\'') + 1, what.size());
  const std::string_view number = what.substr(quote, what.rfind('\'') - quote);
  bool in_string = false;
  std::size_t at = 0;
  for (; at < content.size(); ++at) {
    if (in_string && content[at] == '\\')
      ++at;
    else if (content[at] == '"')
      in_string = !in_string;
    else if (!in_string && content.substr(at).starts_with(number))
      break;
  }
  const std::string_view before = content.substr(0, at);
  const auto line = 1 + std::count(before.begin(), before.end(), '\n');
  const std::size_t column = at - (before.rfind('\n') + 1) + number.size();  // of its last digit, as in other errors
  constexpr std::size_t most = 80;
  return text("line ", line, ", column ", column, ": ", what.substr(0, most), what.size() > most ? "…" : "");
}

}  // namespace

json parse_strict_json(std::string_view content, const std::string& where) {
  try {
    Strict strict(where);
    return json::parse(content.begin(), content.end(),
                       [&](int depth, json::parse_event_t event, json& value) { return strict(depth, event, value); });
  } catch (const json::parse_error& error) {
    fail_input(where, ": not valid JSON: ", reason(error));
  } catch (const json::out_of_range& error) {
    fail_input(where, ": not valid JSON: ", reason(error, content));
  }
}

json read_strict_json(const std::string& path) {
  const MappedFile file(path);
  return parse_strict_json(file.bytes(), path);
}

std::string shown(const json& value) {
  constexpr std::size_t most = 60;
  std::string out = value.dump(-1, ' ', true, json::error_handler_t::replace);
  if (out.size() > most) out = out.substr(0, most) + "…";
  return out;
}

}  // namespace distill
