#include "io/yaml_tree.h"

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <sstream>

#include "core/error.h"
#include "io/utf8.h"

namespace distill {

namespace {

// A configuration is small. Aliases can make a small file expand without end, or contain itself.
constexpr int most_nodes = 20000, most_depth = 100;

class Importer {
 public:
  explicit Importer(std::string name, bool has_lines) : name_(std::move(name)), has_lines_(has_lines) {}

  YamlNode import(const YAML::Node& source, const std::string& where, int depth) {
    check_input(++nodes_ <= most_nodes && depth <= most_depth, where,
                ": is nested too deep or too large: expected at most ", most_depth, " levels and ", most_nodes,
                " values");
    check_tag(source, where);
    YamlNode node(YamlNode::Kind::null, where);
    if (source.IsScalar()) {
      check_text(source.Scalar(), where);
      node.kind = YamlNode::Kind::scalar;
      node.scalar = source.Scalar();
      node.is_quoted = source.Tag() == "!" || source.Tag() == text_tag;
    } else if (source.IsSequence()) {
      node.kind = YamlNode::Kind::list;
      for (const YAML::Node& item : source) node.items.push_back(import(item, at(item.Mark(), where), depth + 1));
    } else if (source.IsMap()) {
      node.kind = YamlNode::Kind::map;
      import_entries(node, source, depth);
    }
    return node;
  }

  std::string at(const YAML::Mark& mark, const std::string& otherwise) const {
    return has_lines_ && !mark.is_null() ? text(name_, ":", mark.line + 1) : otherwise;
  }

 private:
  static constexpr std::string_view text_tag = "tag:yaml.org,2002:str";

  static void check_text(const std::string& bytes, const std::string& where) {
    check_input(is_utf8_text(bytes), where, ": holds bytes that are no text: expected UTF-8");
  }
  static void check_tag(const YAML::Node& source, const std::string& where) {
    const std::string& tag = source.Tag();
    const bool is_standard = tag.empty() || tag == "?" || tag == "!" || tag.starts_with("tag:yaml.org,2002:");
    check_input(is_standard && tag.find("python") == std::string::npos, where, ": has the tag ", tag,
                ": expected plain values");
  }

  void import_entries(YamlNode& node, const YAML::Node& source, int depth) {
    std::vector<YamlNode> merged;
    for (const auto& pair : source) {
      const std::string where = at(pair.first.Mark(), node.where);
      check_input(pair.first.IsScalar(), where, ": has a key that is no plain name");
      const std::string& key = pair.first.Scalar();
      check_text(key, where);
      YamlNode value = import(pair.second, where, depth + 1);
      if (key == "<<" && pair.first.Tag() != "!") {
        collect_merged(merged, std::move(value));
        continue;
      }
      if (const YamlNode* first = node.find(key))
        fail_input(where, ": key '", key, "' is given twice: first at ", first->where);
      node.entries.push_back({key, std::move(value)});
    }
    for (YamlNode& map : merged)  // what is written here wins, then what is merged first
      for (YamlEntry& entry : map.entries)
        if (!node.find(entry.key)) node.entries.push_back(std::move(entry));
  }

  static void collect_merged(std::vector<YamlNode>& merged, YamlNode value) {
    if (value.kind == YamlNode::Kind::list) {
      for (YamlNode& item : value.items) collect_merged(merged, std::move(item));
      return;
    }
    check_input(value.kind == YamlNode::Kind::map, value.where,
                ": <<: expected a section or a list of sections, found ", describe(value));
    merged.push_back(std::move(value));
  }

  std::string name_;
  bool has_lines_;
  int nodes_ = 0;
};

// Takes a document and keeps nothing of it.
class Skip final : public YAML::EventHandler {
  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark&, YAML::anchor_t) override {}
  void OnAlias(const YAML::Mark&, YAML::anchor_t) override {}
  void OnScalar(const YAML::Mark&, const std::string&, YAML::anchor_t, const std::string&) override {}
  void OnSequenceStart(const YAML::Mark&, const std::string&, YAML::anchor_t, YAML::EmitterStyle::value) override {}
  void OnSequenceEnd() override {}
  void OnMapStart(const YAML::Mark&, const std::string&, YAML::anchor_t, YAML::EmitterStyle::value) override {}
  void OnMapEnd() override {}
};

// Looks no further: YAML::LoadAll finds documents without end where one does not end as it should ("! ,").
bool holds_two_documents(const std::string& content) {
  std::istringstream stream(content);
  YAML::Parser parser(stream);
  Skip skip;
  return parser.HandleNextDocument(skip) && parser.HandleNextDocument(skip);
}

YamlNode parse(const std::string& content, const std::string& name, bool has_lines) {
  Importer importer(name, has_lines);
  YAML::Node document;
  bool has_more = false;
  try {
    has_more = holds_two_documents(content);
    document = YAML::Load(content);
  } catch (const YAML::Exception& e) {
    fail_input(importer.at(e.mark, name), ": is not valid YAML: ", e.msg);
  }
  check_input(!has_more, name, ": holds more than one YAML document: expected one");
  if (document.IsNull()) return YamlNode(YamlNode::Kind::null, name);
  return importer.import(document, name, 0);
}

void set(YamlNode& target, YamlNode value) {
  if (target.kind != YamlNode::Kind::map || value.kind != YamlNode::Kind::map) {
    target = std::move(value);
    return;
  }
  for (YamlEntry& entry : value.entries)
    if (YamlNode* present = target.find(entry.key))
      set(*present, std::move(entry.value));
    else
      target.entries.push_back(std::move(entry));
}

}  // namespace

const YamlNode* YamlNode::find(std::string_view key) const {
  const auto entry = std::find_if(entries.begin(), entries.end(), [&](const YamlEntry& e) { return e.key == key; });
  return entry == entries.end() ? nullptr : &entry->value;
}
YamlNode* YamlNode::find(std::string_view key) { return const_cast<YamlNode*>(std::as_const(*this).find(key)); }

YamlNode parse_yaml(const std::string& content, const std::string& name) { return parse(content, name, true); }

void apply_override(YamlNode& root, std::string_view assignment) {
  const std::string where = text("command line '", assignment, "'");
  const std::size_t equals = assignment.find('=');
  check_input(equals != std::string_view::npos, where, ": expected key=value");
  const std::string_view path = assignment.substr(0, equals);
  YamlNode value = parse(std::string(assignment.substr(equals + 1)), where, false);

  YamlNode* node = &root;
  for (std::size_t begin = 0; begin <= path.size();) {
    const std::size_t end = std::min(path.find('.', begin), path.size());
    const std::string key(path.substr(begin, end - begin));
    check_input(!key.empty(), where, ": expected a dotted key before '=', found '", path, "'");
    if (node->kind == YamlNode::Kind::null) *node = YamlNode(YamlNode::Kind::map, where);
    check_input(node->kind == YamlNode::Kind::map, where, ": '", path.substr(0, begin - (begin > 0)),
                "' is no section but ", describe(*node), " (", node->where, ")");
    if (!node->find(key)) node->entries.push_back({key, YamlNode(YamlNode::Kind::null, where)});
    node = node->find(key);
    begin = end + 1;
  }
  set(*node, std::move(value));
}

void link_parents(YamlNode& root) {
  for (YamlNode& item : root.items) {
    item.parent = &root;
    link_parents(item);
  }
  for (YamlEntry& entry : root.entries) {
    entry.value.parent = &root;
    link_parents(entry.value);
  }
}

std::string path_of(const YamlNode& node) {
  if (!node.parent) return "";
  const std::string before = path_of(*node.parent);
  for (std::size_t i = 0; i < node.parent->items.size(); ++i)
    if (&node.parent->items[i] == &node) return text(before, "[", i, "]");
  for (const YamlEntry& entry : node.parent->entries)
    if (&entry.value == &node) return before.empty() ? entry.key : text(before, ".", entry.key);
  return before;
}

std::string describe(const YamlNode& node) {
  constexpr std::size_t shown = 80;
  switch (node.kind) {
    case YamlNode::Kind::list:
      return "a list";
    case YamlNode::Kind::map:
      return "a section";
    case YamlNode::Kind::scalar:
      return node.scalar.size() <= shown ? text("'", node.scalar, "'")
                                         : text("'", node.scalar.substr(0, shown), "...'");
    case YamlNode::Kind::null:
      break;
  }
  return "nothing";
}

}  // namespace distill
