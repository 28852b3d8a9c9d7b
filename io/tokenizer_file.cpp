#include "io/tokenizer_file.h"

#include <nlohmann/json.hpp>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "core/error.h"
#include "io/strict_json.h"

namespace distill {

namespace {

using nlohmann::json;

// No vocabulary comes near it; a damaged id must not ask for all memory.
constexpr std::int64_t largest_id = (1 << 22) - 1;

// What GPT-2 splits text with: ByteLevel with use_regex.
constexpr const char* gpt2_pattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// A value of the file that knows where it stands.
class Field {
 public:
  Field(const json& value, std::string file, std::string name)
      : value_(value), file_(std::move(file)), name_(std::move(name)) {}

  const std::string& name() const { return name_; }
  bool is_null() const { return value_.is_null(); }
  const json& value() const { return value_; }

  template <class... Part>
  [[noreturn]] void reject(const Part&... part) const {
    fail_input(file_, ": ", name_.empty() ? "" : name_ + ": ", part...);
  }

  // The member, or null when there is none.
  Field operator[](const char* key) const {
    static const json none;
    const auto found = object().find(key);
    return {found == value_.end() ? none : *found, file_, name_.empty() ? key : name_ + "." + key};
  }
  Field operator[](std::size_t index) const { return {value_[index], file_, text(name_, "[", index, "]")}; }

  const json& object() const { return expect(value_.is_object(), "an object"); }
  const json& array() const { return expect(value_.is_array(), "an array"); }
  const std::string& string() const { return expect(value_.is_string(), "a string").get_ref<const std::string&>(); }
  bool boolean() const { return expect(value_.is_boolean(), "true or false").get<bool>(); }
  bool boolean_or(bool fallback) const { return is_null() ? fallback : boolean(); }
  std::int32_t id() const {
    expect(value_.is_number_unsigned(), "a token id");
    if (value_.get<std::uint64_t>() > largest_id)
      reject("is ", value_.get<std::uint64_t>(), ", expected a token id of at most ", largest_id);
    return value_.get<std::int32_t>();
  }
  // The "type" member of an object, as all parts of a tokenizer have one.
  const std::string& type() const { return (*this)["type"].string(); }

 private:
  const json& expect(bool ok, const char* expected) const {
    if (!ok) reject("is ", value_.is_null() ? "missing or null" : value_.type_name(), ", expected ", expected);
    return value_;
  }

  const json& value_;
  std::string file_, name_;
};

bool read_normalizer(const Field& normalizer) {
  if (normalizer.is_null()) return false;
  if (normalizer.type() != "NFC") normalizer.reject("\"", normalizer.type(), "\" is not supported, only NFC or null");
  return true;
}

SplitStep read_split(const Field& split) {
  using enum SplitStep::Behavior;
  static const std::unordered_map<std::string_view, SplitStep::Behavior> behaviors = {
      {"Removed", removed},
      {"Isolated", isolated},
      {"MergedWithPrevious", merged_with_previous},
      {"MergedWithNext", merged_with_next},
      {"Contiguous", contiguous}};
  const Field pattern = split["pattern"];
  SplitStep step;
  const bool literal = !pattern["String"].is_null();
  const Field written = literal ? pattern["String"] : pattern["Regex"];
  if (written.is_null()) pattern.reject("expected \"Regex\" or \"String\"");
  step.kind = literal ? SplitStep::Pattern::literal : SplitStep::Pattern::regex;
  step.pattern = written.string();
  step.field = written.name();
  const Field behavior = split["behavior"];
  const auto found = behaviors.find(behavior.string());
  if (found == behaviors.end())
    behavior.reject("\"", behavior.string(),
                    "\" is unknown, expected Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous");
  step.behavior = found->second;
  step.invert = split["invert"].boolean_or(false);
  return step;
}

SplitStep read_digits(const Field& digits) {
  SplitStep step;
  step.kind = SplitStep::Pattern::numeric;
  step.field = digits.name();
  step.behavior =
      digits["individual_digits"].boolean_or(false) ? SplitStep::Behavior::isolated : SplitStep::Behavior::contiguous;
  return step;
}

// Adds the steps of one pre-tokenizer. ByteLevel turns text into the byte alphabet, so it is the last one.
void read_pre_tokenizer(const Field& part, TokenizerFile& file, bool& byte_level_seen, int depth) {
  const std::string& type = part.type();
  if (type == "Sequence") {
    if (depth == 8) part.reject("Sequence is nested too deeply");
    const Field members = part["pretokenizers"];
    for (std::size_t i = 0; i < members.array().size(); ++i)
      read_pre_tokenizer(members[i], file, byte_level_seen, depth + 1);
    return;
  }
  if (byte_level_seen) part.reject("\"", type, "\" after ByteLevel is not supported");
  if (type == "Split") {
    file.splits.push_back(read_split(part));
  } else if (type == "Digits") {
    file.splits.push_back(read_digits(part));
  } else if (type == "ByteLevel") {
    byte_level_seen = true;
    file.add_prefix_space = part["add_prefix_space"].boolean();
    if (part["use_regex"].boolean_or(true)) {
      SplitStep step;
      step.pattern = gpt2_pattern;
      step.field = part.name();
      file.byte_level_split.push_back(step);
    }
  } else {
    part.reject("\"", type, "\" is not supported, only Sequence, Split, Digits and ByteLevel");
  }
}

using Ids = std::unordered_map<std::string_view, std::int32_t>;

// The strings of the map live in file.tokens, which keeps its size from here on.
Ids read_vocabulary(const Field& vocabulary, TokenizerFile& file) {
  const json& entries = vocabulary.object();
  if (entries.empty()) vocabulary.reject("is empty");
  std::int32_t largest = 0;
  for (const auto& [token, id] : entries.items())
    largest = std::max(largest, Field(id, file.path, vocabulary.name() + "[\"" + token + "\"]").id());
  file.tokens.resize(static_cast<std::size_t>(largest) + 1);
  Ids ids;
  ids.reserve(entries.size());
  for (const auto& [token, value] : entries.items()) {
    const auto id = value.get<std::int32_t>();
    std::optional<std::string>& slot = file.tokens[static_cast<std::size_t>(id)];
    if (slot) vocabulary.reject("id ", id, " is given to \"", *slot, "\" and to \"", token, "\"");
    slot = token;
    ids.emplace(*slot, id);
  }
  return ids;
}

// "left right" or ["left", "right"].
std::pair<std::string_view, std::string_view> read_pair(const Field& merge) {
  const json& value = merge.value();
  if (value.is_array() && value.size() == 2 && value[0].is_string() && value[1].is_string())
    return {value[0].get_ref<const std::string&>(), value[1].get_ref<const std::string&>()};
  const std::string_view both = value.is_string() ? value.get_ref<const std::string&>() : std::string_view();
  const std::size_t space = both.find(' ');
  if (space == both.npos || both.find(' ', space + 1) != both.npos)
    merge.reject("expected \"left right\" or [\"left\", \"right\"]");
  return {both.substr(0, space), both.substr(space + 1)};
}

void read_merges(const Field& merges, const Ids& ids, TokenizerFile& file) {
  const json& entries = merges.array();
  file.merges.reserve(entries.size());
  for (std::size_t i = 0; i < entries.size(); ++i) {
    if (entries[i].is_string() && entries[i].get_ref<const std::string&>().starts_with("#version")) continue;
    const auto [left, right] = read_pair(Field(entries[i], file.path, text(merges.name(), "[", i, "]")));
    const auto id_of = [&](std::string_view token) {
      const auto found = ids.find(token);
      if (found == ids.end()) merges[i].reject("token \"", token, "\" is not in model.vocab");
      return found->second;
    };
    file.merges.push_back({id_of(left), id_of(right), id_of(std::string(left) + std::string(right))});
  }
}

Ids read_model(const Field& model, TokenizerFile& file) {
  const Field type = model["type"];
  if (!type.is_null() && type.string() != "BPE") type.reject("\"", type.string(), "\" is not supported, only BPE");
  const Field dropout = model["dropout"];
  if (!dropout.is_null() && dropout.value() != 0) dropout.reject("is ", dropout.value().dump(), ", expected null or 0");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const Field affix = model[key];
    if (!affix.is_null() && !affix.string().empty()) affix.reject("is not supported, expected null or \"\"");
  }
  if (model["byte_fallback"].boolean_or(false)) model["byte_fallback"].reject("is not supported, expected false");
  file.ignore_merges = model["ignore_merges"].boolean_or(false);
  file.fuse_unknown = model["fuse_unk"].boolean_or(false);

  Ids ids = read_vocabulary(model["vocab"], file);
  read_merges(model["merges"], ids, file);
  const Field unknown = model["unk_token"];
  if (!unknown.is_null()) {
    const auto found = ids.find(unknown.string());
    if (found == ids.end()) unknown.reject("\"", unknown.string(), "\" is not in model.vocab");
    file.unknown = found->second;
  }
  return ids;
}

AddedToken read_added_token(const Field& entry) {
  AddedToken token;
  token.id = entry["id"].id();
  token.content = entry["content"].string();
  token.single_word = entry["single_word"].boolean_or(false);
  token.lstrip = entry["lstrip"].boolean_or(false);
  token.rstrip = entry["rstrip"].boolean_or(false);
  token.special = entry["special"].boolean_or(false);
  token.normalized = entry["normalized"].boolean_or(!token.special);
  return token;
}

// The reference library does not read the ids of added tokens but numbers them itself: after the vocabulary, in order.
// A file that says otherwise would mean one thing here and another there.
void read_added_tokens(const Field& entries, const Ids& ids, TokenizerFile& file) {
  if (entries.is_null()) return;
  const auto vocabulary_size = static_cast<std::int32_t>(ids.size());
  std::int32_t next = vocabulary_size;
  std::unordered_map<std::string, std::int32_t> added;
  for (std::size_t i = 0; i < entries.array().size(); ++i) {
    const Field entry = entries[i];
    AddedToken token = read_added_token(entry);
    if (token.content.empty()) continue;
    if (added.contains(token.content)) entry.reject("\"", token.content, "\" is there twice");
    const auto in_model = ids.find(token.content);
    const std::int32_t expected = in_model != ids.end() ? in_model->second : next;
    if (token.id != expected)
      entry["id"].reject("is ", token.id, " for \"", token.content, "\", expected ", expected,
                         in_model != ids.end() ? ", its id in model.vocab" : ", the first free id");
    const bool taken = static_cast<std::size_t>(expected) < file.tokens.size() && file.tokens[expected];
    if (in_model == ids.end() && taken)
      entry["id"].reject("is ", token.id, ", which is \"", *file.tokens[expected], "\" in model.vocab");
    next = std::max(next, expected + 1);
    added.emplace(token.content, token.id);
    file.added_tokens.push_back(std::move(token));
  }
}

}  // namespace

TokenizerFile read_tokenizer_file(const std::string& path) {
  const json content = read_strict_json(path);
  TokenizerFile file;
  file.path = path;
  const Field root(content, path, "");
  const Field version = root["version"];
  if (!version.is_null() && version.string() != "1.0")
    version.reject("\"", version.string(), "\" is not supported, only \"1.0\"");
  file.nfc = read_normalizer(root["normalizer"]);
  bool byte_level_seen = false;
  const Field pre_tokenizer = root["pre_tokenizer"];
  read_pre_tokenizer(pre_tokenizer, file, byte_level_seen, 0);
  if (!byte_level_seen) pre_tokenizer.reject("has no ByteLevel: only byte-level BPE is supported");
  const Field decoder = root["decoder"];
  if (decoder.type() != "ByteLevel") decoder.reject("\"", decoder.type(), "\" is not supported, only ByteLevel");
  const Ids ids = read_model(root["model"], file);
  read_added_tokens(root["added_tokens"], ids, file);
  return file;
}

}  // namespace distill
