// The values a configuration can hold, to and from text. For each type: read_value from YAML, written as it stands in a
// file, and allowed: the words for what it may be, used by messages and by the help alike.
#pragma once

#include <concepts>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "core/config.h"
#include "io/yaml_tree.h"

namespace distill {

// Returns what was found in place of an allowed value; empty when `value` has been read. Interpolation has been done.
std::string read_value(bool& value, const YamlNode& node, const Rule& rule);
std::string read_value(double& value, const YamlNode& node, const Rule& rule);
std::string read_value(Seconds& value, const YamlNode& node, const Rule& rule);
std::string read_value(std::string& value, const YamlNode& node, const Rule& rule);
std::string read_value(Resume& value, const YamlNode& node, const Rule& rule);
std::string read_value(std::vector<std::string>& value, const YamlNode& node, const Rule& rule);
std::string read_value(std::vector<int>& value, const YamlNode& node, const Rule& rule);

// "0.5", "10min", "[0, 1]", "~" for what is not given.
std::string written(bool value);
std::string written(std::int64_t value);
std::string written(double value);
std::string written(Seconds value);
std::string written(const std::string& value);
std::string written(const Resume& value);
std::string written(const std::vector<std::string>& value);
std::string written(const std::vector<int>& value);

// The argument only says which type is meant.
std::string allowed(bool, const Rule& rule);
std::string allowed(std::int64_t, const Rule& rule);
std::string allowed(double, const Rule& rule);
std::string allowed(Seconds, const Rule& rule);
std::string allowed(const std::string&, const Rule& rule);
std::string allowed(const Resume&, const Rule& rule);
std::string allowed(const std::vector<std::string>&, const Rule& rule);
std::string allowed(const std::vector<int>&, const Rule& rule);

// "a, b or c"
std::string one_of_text(const std::vector<std::string_view>& names);

// --- integers, enumerations, optional values and "auto"

std::string read_integer(std::int64_t& value, const YamlNode& node, const Rule& rule, std::int64_t largest);

template <std::signed_integral T>
std::string read_value(T& value, const YamlNode& node, const Rule& rule) {
  std::int64_t wide = 0;
  std::string found = read_integer(wide, node, rule, std::numeric_limits<T>::max());
  if (found.empty()) value = static_cast<T>(wide);
  return found;
}
inline std::string written(int value) { return written(std::int64_t{value}); }
inline std::string allowed(int, const Rule& rule) { return allowed(std::int64_t{}, rule); }

template <class E>
requires std::is_enum_v<E> std::string read_value(E& value, const YamlNode& node, const Rule&) {
  if (node.kind == YamlNode::Kind::scalar)
    for (const Choice<E>& choice : choices<E>)
      if (choice.name == node.scalar) {
        value = choice.value;
        return "";
      }
  return describe(node);
}
template <class E>
requires std::is_enum_v<E> std::string written(E value) {
  for (const Choice<E>& choice : choices<E>)
    if (choice.value == value) return std::string(choice.name);
  return "?";
}
template <class E>
requires std::is_enum_v<E> std::string allowed(E, const Rule&) {
  std::vector<std::string_view> names;
  for (const Choice<E>& choice : choices<E>)
    if (written(choice.value) == choice.name) names.push_back(choice.name);
  return one_of_text(names);
}

template <class T>
std::string read_value(std::optional<T>& value, const YamlNode& node, const Rule& rule) {
  T given{};
  std::string found = read_value(given, node, rule);
  if (found.empty()) value = std::move(given);
  return found;
}
template <class T>
std::string written(const std::optional<T>& value) {
  return value ? written(*value) : "~";
}
template <class T>
std::string allowed(const std::optional<T>&, const Rule& rule) {
  return allowed(T{}, rule);
}

template <class T>
std::string read_value(AutoOr<T>& value, const YamlNode& node, const Rule& rule) {
  if (node.scalar != "auto") return read_value(value.value, node, rule);
  value.value.reset();
  return "";
}
template <class T>
std::string written(const AutoOr<T>& value) {
  return value.value ? written(*value.value) : "auto";
}
template <class T>
std::string allowed(const AutoOr<T>&, const Rule& rule) {
  return "auto or " + allowed(T{}, rule);
}

}  // namespace distill
