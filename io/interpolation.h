// ${…} in values, as OmegaConf reads them: ${other.key}, relative ${.sibling} and ${..key}, ${oc.env:NAME,default},
// nested, with \${ for a literal. Values are looked up when asked for, so keys that nobody reads may hold anything.
#pragma once

#include <deque>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "io/yaml_tree.h"

namespace distill {

class Interpolation {
 public:
  // The tree must be linked and outlive this.
  explicit Interpolation(const YamlNode& root) : root_(root) {}

  // What the node says: itself, what it refers to (of any kind), or a text put together. Its location is the node's
  // own. Elements of lists and sections are not followed.
  const YamlNode& resolve(const YamlNode& node);

  // The same as a copy, with the elements of a list resolved too.
  YamlNode expand(const YamlNode& node);

  // Some reference went to this node or into it.
  bool is_used(const YamlNode& node) const { return used_.contains(&node); }

  // The resolved node at a dotted path, or none.
  const YamlNode* lookup(std::string_view path);

 private:
  const YamlNode& evaluate(std::string_view text, const YamlNode& context);
  std::string evaluate_text(std::string_view text, const YamlNode& context);
  const YamlNode& refer(std::string_view inner, const YamlNode& context);
  const YamlNode& call(std::string_view resolver, std::string_view arguments, const YamlNode& context);
  bool is_hydra_default(std::string_view name) const;
  const YamlNode* follow(const YamlNode* start, std::string_view path);
  const YamlNode& make(YamlNode::Kind kind, std::string scalar, const YamlNode& context);

  const YamlNode& root_;
  std::deque<YamlNode> made_;
  std::vector<const YamlNode*> open_;  // being resolved: to find cycles
  std::set<const YamlNode*> used_;
};

// The text that resolve() reads as `literal`.
std::string escape_interpolation(std::string_view literal);

}  // namespace distill
