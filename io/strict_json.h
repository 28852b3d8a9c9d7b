// JSON as files of this project must be: valid, no key twice in an object, no absurd nesting. Include only in .cpp
// files together with <nlohmann/json.hpp>.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace distill {

// An input error names `where` (a path) and the position.
nlohmann::json parse_strict_json(std::string_view text, const std::string& where);
// The same for a whole file.
nlohmann::json read_strict_json(const std::string& path);
// A value as a message shows it: at most a few dozen characters.
std::string shown(const nlohmann::json& value);

}  // namespace distill
