#include "io/interpolation.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstdlib>
#include <optional>

#include "core/error.h"
#include "io/utf8.h"

namespace distill {

namespace {

constexpr std::size_t longest_chain = 100;

std::string_view trimmed(std::string_view s) {
  while (!s.empty() && std::isspace(static_cast<unsigned char>(s.front()))) s.remove_prefix(1);
  while (!s.empty() && std::isspace(static_cast<unsigned char>(s.back()))) s.remove_suffix(1);
  return s;
}

bool is_quote(char c) { return c == '\'' || c == '"'; }

// Walks over the inside of ${…}, with everything in quotes or inner ${…} skipped, to the first character that `stop`
// wants; text.size() when there is none.
template <class Stop>
std::size_t find_outside(std::string_view text, std::size_t begin, Stop stop) {
  int depth = 0;
  for (std::size_t i = begin; i < text.size(); ++i) {
    if (is_quote(text[i]) && text.find(text[i], i + 1) != std::string_view::npos) {
      i = text.find(text[i], i + 1);
      continue;
    }
    if (depth == 0 && stop(text[i])) return i;
    if (text.substr(i, 2) == "${")
      ++depth, ++i;
    else if (text[i] == '}')
      --depth;
  }
  return text.size();
}

// The next ${…} of a text that stands at a backslash run or at '${'.
struct Opening {
  std::size_t at = 0;           // first backslash, or '$'
  std::size_t backslashes = 0;  // in front of '${'
};
std::optional<Opening> next_opening(std::string_view text, std::size_t begin) {
  const std::size_t dollar = text.find("${", begin);
  if (dollar == std::string_view::npos) return std::nullopt;
  std::size_t first = dollar;
  while (first > begin && text[first - 1] == '\\') --first;
  return Opening{first, dollar - first};
}

bool is_ancestor(const YamlNode& ancestor, const YamlNode& node) {
  for (const YamlNode* n = node.parent; n; n = n->parent)
    if (n == &ancestor) return true;
  return false;
}

}  // namespace

const YamlNode& Interpolation::make(YamlNode::Kind kind, std::string scalar, const YamlNode& context) {
  YamlNode& node = made_.emplace_back(kind, context.where);
  node.scalar = std::move(scalar);
  node.parent = context.parent;
  return node;
}

const YamlNode& Interpolation::resolve(const YamlNode& node) {
  if (node.kind != YamlNode::Kind::scalar || node.scalar.find("${") == std::string::npos) return node;
  if (std::find(open_.begin(), open_.end(), &node) != open_.end()) {
    std::string chain;
    for (auto it = std::find(open_.begin(), open_.end(), &node); it != open_.end(); ++it)
      chain += path_of(**it) + " -> ";
    fail_input(node.where, ": ", path_of(node), ": refers to itself: ", chain, path_of(node));
  }
  check_input(open_.size() < longest_chain, node.where, ": ", path_of(node), ": is a chain of more than ",
              longest_chain, " references");
  open_.push_back(&node);
  const YamlNode& result = evaluate(node.scalar, node);
  open_.pop_back();
  return result;
}

YamlNode Interpolation::expand(const YamlNode& node) {
  const YamlNode& source = resolve(node);
  YamlNode copy = source;
  for (std::size_t i = 0; i < copy.items.size(); ++i) copy.items[i] = resolve(source.items[i]);
  return copy;
}

// A text that is one ${…} and nothing else keeps the kind of what it refers to.
const YamlNode& Interpolation::evaluate(std::string_view text, const YamlNode& context) {
  if (text.starts_with("${")) {
    const std::size_t end = find_outside(text, 2, [](char c) { return c == '}'; });
    if (end + 1 == text.size()) return refer(text.substr(2, end - 2), context);
  }
  return make(YamlNode::Kind::scalar, evaluate_text(text, context), context);
}

std::string Interpolation::evaluate_text(std::string_view text, const YamlNode& context) {
  std::string result;
  std::size_t begin = 0;
  while (const auto opening = next_opening(text, begin)) {
    result += text.substr(begin, opening->at - begin);
    result.append(opening->backslashes / 2, '\\');  // a pair stands for one
    const std::size_t dollar = opening->at + opening->backslashes;
    if (opening->backslashes % 2 == 1) {
      result += "${";
      begin = dollar + 2;
      continue;
    }
    const std::size_t end = find_outside(text, dollar + 2, [](char c) { return c == '}'; });
    check_input(end < text.size(), context.where, ": ", path_of(context), ": '${' is not closed in '", text, "'");
    const std::string_view inner = text.substr(dollar + 2, end - dollar - 2);
    const YamlNode& value = refer(inner, context);
    check_input(value.kind == YamlNode::Kind::scalar, context.where, ": ", path_of(context), ": ${", inner, "} is ",
                describe(value), " and cannot be part of a text");
    result += value.scalar;
    begin = end + 1;
  }
  return result.append(text.substr(begin));
}

const YamlNode& Interpolation::refer(std::string_view inner, const YamlNode& context) {
  const std::size_t colon = find_outside(inner, 0, [](char c) { return c == ':'; });
  if (colon < inner.size()) return call(trimmed(inner.substr(0, colon)), inner.substr(colon + 1), context);

  const std::string whole = evaluate_text(trimmed(inner), context);
  std::string_view path = whole;
  const YamlNode* start = &root_;
  if (path.starts_with('.')) {
    for (start = &context; start && path.starts_with('.'); path.remove_prefix(1)) start = start->parent;
    check_input(start, context.where, ": ", path_of(context), ": ${", inner, "} has too many dots: it leaves the file");
  }
  check_input(!path.empty(), context.where, ": ", path_of(context), ": ${", inner, "} names no key");
  const YamlNode* target = follow(start, path);
  if (!target) {
    if (is_hydra_default(path.substr(0, path.find('.')))) return make(YamlNode::Kind::null, "", context);
    fail_input(context.where, ": ", path_of(context), ": ${", inner, "} refers to '", path,
               "', which is given neither in the file nor on the command line");
  }
  check_input(!is_ancestor(*target, context), context.where, ": ", path_of(context), ": ${", inner,
              "} refers to the section it is in");
  return *target;
}

// A hydra file takes sections from other files ("../config/deepspeed_zero3@_here_"); they hold options of other
// programs.
bool Interpolation::is_hydra_default(std::string_view name) const {
  const YamlNode* defaults = root_.find("defaults");
  return defaults && std::any_of(defaults->items.begin(), defaults->items.end(), [&](const YamlNode& item) {
           const std::string_view file = std::string_view(item.scalar).substr(0, item.scalar.find('@'));
           return file.substr(file.rfind('/') + 1) == name;
         });
}

const YamlNode& Interpolation::call(std::string_view resolver, std::string_view arguments, const YamlNode& context) {
  check_input(resolver == "oc.env", context.where, ": ", path_of(context), ": unknown resolver '", resolver,
              "': expected ${key} or ${oc.env:NAME,default}");
  std::vector<std::string_view> parts;
  for (std::size_t begin = 0; begin <= arguments.size();) {
    const std::size_t end = find_outside(arguments, begin, [](char c) { return c == ','; });
    parts.push_back(trimmed(arguments.substr(begin, end - begin)));
    begin = end + 1;
  }
  const std::string name = evaluate_text(parts.front(), context);
  check_input(!name.empty() && parts.size() <= 2, context.where, ": ", path_of(context), ": ${oc.env:", arguments,
              "}: expected ${oc.env:NAME} or ${oc.env:NAME,default}");
  if (const char* value = std::getenv(name.c_str())) {
    check_input(is_utf8_text(value), context.where, ": ", path_of(context), ": the environment variable ", name,
                " holds bytes that are no text: expected UTF-8");
    return make(YamlNode::Kind::scalar, value, context);
  }
  check_input(parts.size() == 2, context.where, ": ", path_of(context), ": the environment variable ", name,
              " is not set; ${oc.env:", name, ",default} gives it a default");
  std::string_view fallback = parts[1];
  if (fallback == "null") return make(YamlNode::Kind::null, "", context);
  if (fallback.size() >= 2 && is_quote(fallback.front()) && fallback.back() == fallback.front())
    return make(YamlNode::Kind::scalar, std::string(fallback.substr(1, fallback.size() - 2)), context);
  return evaluate(fallback, context);
}

const YamlNode* Interpolation::lookup(std::string_view path) { return follow(&root_, path); }

// Steps are separated by dots or written in brackets: a.b, list.0, list[0].
const YamlNode* Interpolation::follow(const YamlNode* start, std::string_view path) {
  const YamlNode* node = start;
  while (!path.empty()) {
    if (path.front() == '.' || path.front() == '[') path.remove_prefix(1);
    const std::size_t end = std::min(path.find_first_of(".[]"), path.size());
    const std::string_view step = path.substr(0, end);
    path.remove_prefix(end);
    if (path.starts_with(']')) path.remove_prefix(1);

    const YamlNode& here = resolve(*node);
    const YamlNode* next = here.find(step);
    std::size_t index = 0;
    const auto [stop, error] = std::from_chars(step.data(), step.data() + step.size(), index);
    if (error == std::errc{} && stop == step.data() + step.size() && index < here.items.size())
      next = &here.items[index];
    if (!next) return nullptr;
    used_.insert(next);
    node = next;
  }
  return &resolve(*node);
}

std::string escape_interpolation(std::string_view literal) {
  std::string escaped;
  std::size_t begin = 0;
  while (const auto opening = next_opening(literal, begin)) {
    escaped += literal.substr(begin, opening->at - begin);
    escaped.append(2 * opening->backslashes + 1, '\\').append("${");
    begin = opening->at + opening->backslashes + 2;
  }
  return escaped.append(literal.substr(begin));
}

}  // namespace distill
