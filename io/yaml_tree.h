// A YAML document as a plain tree that knows where each value was written. Stricter than yaml-cpp: a key given twice is
// an error, merge keys (<<) are resolved. `key=value` overrides are put into the same tree.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace distill {

struct YamlEntry;

struct YamlNode {
  enum class Kind { null, scalar, list, map };

  Kind kind = Kind::null;
  std::string scalar;
  bool is_quoted = false;            // a scalar in quotes is text, whatever it looks like
  std::vector<YamlNode> items;       // of a list
  std::vector<YamlEntry> entries;    // of a map, in the order of the file
  std::string where;                 // "x.yaml:12" or "command line 'key=value'"
  const YamlNode* parent = nullptr;  // set by link_parents

  YamlNode();
  YamlNode(Kind k, std::string location);

  const YamlNode* find(std::string_view key) const;
  YamlNode* find(std::string_view key);
};

struct YamlEntry {
  std::string key;
  YamlNode value;
};

// Here, where an entry is complete.
inline YamlNode::YamlNode() = default;
inline YamlNode::YamlNode(Kind k, std::string location) : kind(k), where(std::move(location)) {}

// One document. `name` stands for the file in messages.
YamlNode parse_yaml(const std::string& content, const std::string& name);

// Puts "a.b.c=value" into the tree, value read as YAML; a map is merged into what is there.
void apply_override(YamlNode& root, std::string_view assignment);

// To be called when the tree is complete: nodes must not move afterwards.
void link_parents(YamlNode& root);

// "a.b[2].c"; empty for the root.
std::string path_of(const YamlNode& node);

// "'text'", "a list", "a section", "nothing": for messages.
std::string describe(const YamlNode& node);

}  // namespace distill
