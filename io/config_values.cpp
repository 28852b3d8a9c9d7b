#include "io/config_values.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <iterator>

#include "core/error.h"

namespace distill {

namespace {

constexpr std::size_t most_devices = 65536;

// The whole text as a number, or none. Decimal, without a sign in front of '+'.
template <class T>
std::optional<T> number(std::string_view digits) {
  T value{};
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error != std::errc{} || end != digits.data() + digits.size()) return std::nullopt;
  return value;
}

bool is_digits(std::string_view s) {
  return !s.empty() && std::all_of(s.begin(), s.end(), [](char c) { return c >= '0' && c <= '9'; });
}

bool in_range(double value, const Rule& rule) {
  return (rule.excludes_low ? value > rule.low : value >= rule.low) &&
         (rule.excludes_high ? value < rule.high : value <= rule.high);
}

std::string range_text(const Rule& rule) {
  const bool has_low = std::isfinite(rule.low), has_high = std::isfinite(rule.high);
  std::string range;
  if (has_low) range += (rule.excludes_low ? " above " : " at least ") + written(rule.low);
  if (has_low && has_high) range += " and";
  if (has_high) range += (rule.excludes_high ? " below " : " at most ") + written(rule.high);
  return range;
}

// "3h55m", "1.5h", "20s", "250ms" or a plain number of seconds.
std::optional<double> seconds_of(std::string_view duration) {
  struct Unit {
    std::string_view name;
    double seconds;
  };
  constexpr auto units =
      std::to_array<Unit>({{"ms", 1e-3}, {"s", 1}, {"m", 60}, {"min", 60}, {"h", 3600}, {"d", 86400}});
  constexpr std::string_view digits = "0123456789.";
  if (const std::optional<double> plain = number<double>(duration)) return plain;
  if (duration.empty()) return std::nullopt;
  double total = 0;
  while (!duration.empty()) {
    const std::size_t unit_begin = std::min(duration.find_first_not_of(digits), duration.size());
    const std::optional<double> amount = number<double>(duration.substr(0, unit_begin));
    duration.remove_prefix(unit_begin);
    const std::size_t unit_end = std::min(duration.find_first_of(digits), duration.size());
    const auto unit =
        std::find_if(units.begin(), units.end(), [&](const Unit& u) { return u.name == duration.substr(0, unit_end); });
    if (!amount || unit == units.end()) return std::nullopt;
    total += *amount * unit->seconds;
    duration.remove_prefix(unit_end);
  }
  return total;
}

// Device lists as Python writes them, parsed and never evaluated: terms joined by '+', each list(range(…)), range(…) or
// [1, 2, …].
class DeviceListParser {
 public:
  explicit DeviceListParser(std::string_view text) : rest_(text) {}

  std::optional<std::vector<int>> parse() {
    do {
      if (!term()) return std::nullopt;
    } while (accept("+"));
    skip_space();
    if (!rest_.empty()) return std::nullopt;
    return std::move(devices_);
  }

 private:
  void skip_space() { rest_.remove_prefix(std::min(rest_.find_first_not_of(" \t"), rest_.size())); }

  bool accept(std::string_view token) {
    skip_space();
    if (!rest_.starts_with(token)) return false;
    rest_.remove_prefix(token.size());
    return true;
  }

  bool term() {
    if (accept("[")) {
      std::vector<int> values;
      if (!integers(values, "]")) return false;
      devices_.insert(devices_.end(), values.begin(), values.end());
      return devices_.size() <= most_devices;
    }
    if (accept("list")) return accept("(") && range() && accept(")");
    return range();
  }

  bool range() {
    std::vector<int> arguments;
    if (!accept("range") || !accept("(") || !integers(arguments, ")")) return false;
    if (arguments.empty() || arguments.size() > 3) return false;
    const std::int64_t start = arguments.size() == 1 ? 0 : arguments[0];
    const std::int64_t stop = arguments.size() == 1 ? arguments[0] : arguments[1];
    const std::int64_t step = arguments.size() == 3 ? arguments[2] : 1;
    if (step == 0) return false;
    for (std::int64_t i = start; step > 0 ? i < stop : i > stop; i += step) {
      if (devices_.size() >= most_devices) return false;
      devices_.push_back(static_cast<int>(i));
    }
    return true;
  }

  bool integers(std::vector<int>& values, std::string_view closing) {
    if (accept(closing)) return true;
    do {
      skip_space();
      const std::size_t end = std::min(rest_.find_first_not_of("-0123456789"), rest_.size());
      const std::optional<int> value = number<int>(rest_.substr(0, end));
      if (!value) return false;
      values.push_back(*value);
      rest_.remove_prefix(end);
    } while (accept(","));
    return accept(closing);
  }

  std::string_view rest_;
  std::vector<int> devices_;
};

template <class T>
std::string bracketed(const std::vector<T>& values) {
  std::string list = "[";
  for (const T& value : values) list += (list.size() > 1 ? ", " : "") + written(value);
  return list + "]";
}

}  // namespace

std::string one_of_text(const std::vector<std::string_view>& names) {
  std::string list;
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (i > 0) list += i + 1 == names.size() ? " or " : ", ";
    list += names[i];
  }
  return list;
}

// --- bool: the spellings of YAML 1.1

std::string read_value(bool& value, const YamlNode& node, const Rule&) {
  constexpr std::array<std::string_view, 9> yes = {"true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"};
  constexpr std::array<std::string_view, 9> no = {"false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"};
  const bool is_yes = std::find(yes.begin(), yes.end(), node.scalar) != yes.end();
  if (!is_yes && std::find(no.begin(), no.end(), node.scalar) == no.end()) return describe(node);
  value = is_yes;
  return "";
}
std::string written(bool value) { return value ? "true" : "false"; }
std::string allowed(bool, const Rule&) { return "true or false"; }

// --- numbers: decimal, and never octal or hexadecimal

std::string read_integer(std::int64_t& value, const YamlNode& node, const Rule& rule, std::int64_t largest) {
  std::string_view digits = node.scalar;
  if (digits.starts_with('+')) digits.remove_prefix(1);
  const std::string_view magnitude = digits.substr(digits.starts_with('-') ? 1 : 0);
  if (!is_digits(magnitude)) return describe(node);
  if (magnitude.size() > 1 && magnitude.front() == '0') return describe(node) + " (leading zero: write it in decimal)";
  const std::optional<std::int64_t> given = number<std::int64_t>(digits);
  if (!given || *given > largest) return describe(node) + " (the largest is " + written(largest) + ")";
  if (!in_range(static_cast<double>(*given), rule)) return describe(node);
  value = *given;
  return "";
}
std::string written(std::int64_t value) { return std::to_string(value); }
std::string allowed(std::int64_t, const Rule& rule) { return "an integer" + range_text(rule); }

std::string read_value(double& value, const YamlNode& node, const Rule& rule) {
  std::string_view digits = node.scalar;
  if (digits.starts_with('+')) digits.remove_prefix(1);
  const std::optional<double> given = digits.starts_with("+") ? std::nullopt : number<double>(digits);
  if (!given || !std::isfinite(*given) || !in_range(*given, rule)) return describe(node);
  value = *given;
  return "";
}
std::string written(double value) {
  std::array<char, 32> digits{};  // the shortest text that reads back to the same number
  return {digits.data(), std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr};
}
std::string allowed(double, const Rule& rule) { return "a number" + range_text(rule); }

// --- durations

std::string read_value(Seconds& value, const YamlNode& node, const Rule& rule) {
  const std::optional<double> given = seconds_of(node.scalar);
  if (!given || !std::isfinite(*given) || !in_range(*given, rule)) return describe(node);
  value = Seconds(*given);
  return "";
}
std::string written(Seconds value) {
  const double seconds = value.count();
  constexpr double longest_whole = 1e15;
  if (seconds != std::floor(seconds) || seconds < 60 || seconds > longest_whole) {
    std::array<char, 1100> digits{};  // no exponent, because a unit follows; a double has at most 1075 digits
    const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), seconds, std::chars_format::fixed).ptr;
    return std::string(digits.data(), end) + "s";
  }
  const auto whole = static_cast<std::int64_t>(seconds);
  std::string duration;
  if (whole / 3600 > 0) duration += written(whole / 3600) + "h";
  if (whole / 60 % 60 > 0) duration += written(whole / 60 % 60) + "min";
  if (whole % 60 > 0) duration += written(whole % 60) + "s";
  return duration;
}
std::string allowed(Seconds, const Rule& rule) { return "a duration" + range_text(rule) + " (90s, 10min, 3h55m)"; }

// --- text

std::string read_value(std::string& value, const YamlNode& node, const Rule& rule) {
  if (node.kind != YamlNode::Kind::scalar) return describe(node);
  if (!rule.names.empty() && std::find(rule.names.begin(), rule.names.end(), node.scalar) == rule.names.end())
    return describe(node);
  value = node.scalar;
  return "";
}
std::string written(const std::string& value) { return value.empty() ? "~" : value; }
std::string allowed(const std::string&, const Rule& rule) {
  return rule.names.empty() ? "text" : one_of_text({rule.names.begin(), rule.names.end()});
}

std::string read_value(Resume& value, const YamlNode& node, const Rule& rule) {
  if (node.kind != YamlNode::Kind::scalar) return describe(node);
  value = {};
  if (node.is_quoted || !read_value(value.wanted, node, rule).empty()) value = {true, node.scalar};
  return "";
}
std::string written(const Resume& value) { return value.path.empty() ? written(value.wanted) : value.path; }
std::string allowed(const Resume&, const Rule&) { return "true, false or a path"; }

// --- lists

std::string read_value(std::vector<std::string>& value, const YamlNode& node, const Rule&) {
  if (node.kind == YamlNode::Kind::scalar) {
    value = {node.scalar};
    return "";
  }
  if (node.kind != YamlNode::Kind::list) return describe(node);
  std::vector<std::string> given;
  for (const YamlNode& item : node.items) {
    if (item.kind != YamlNode::Kind::scalar || item.scalar.empty())
      return "a list whose element " + written(std::int64_t(given.size()) + 1) + " is " + describe(item);
    given.push_back(item.scalar);
  }
  value = std::move(given);
  return "";
}
std::string written(const std::vector<std::string>& value) { return value.empty() ? "~" : bracketed(value); }
std::string allowed(const std::vector<std::string>&, const Rule&) { return "text or a list of texts"; }

std::string read_value(std::vector<int>& value, const YamlNode& node, const Rule& rule) {
  std::vector<int> given;
  if (node.kind == YamlNode::Kind::list) {
    for (const YamlNode& item : node.items) {
      given.emplace_back();
      if (const std::string found = read_value(given.back(), item, rule); !found.empty())
        return "a list whose element " + written(std::int64_t(given.size())) + " is " + found;
    }
  } else {
    std::optional<std::vector<int>> parsed = DeviceListParser(node.scalar).parse();
    if (!parsed) return describe(node);
    given = *std::move(parsed);
    for (const int device : given)
      if (!in_range(device, rule)) return describe(node) + ", which holds " + written(device);
  }
  if (given.empty()) return "an empty list";
  value = std::move(given);
  return "";
}
std::string written(const std::vector<int>& value) { return value.empty() ? "~" : bracketed(value); }
std::string allowed(const std::vector<int>&, const Rule& rule) {
  return "a list of integers" + range_text(rule) + ", or list(range(start,stop,step))";
}

}  // namespace distill
