#include "io/chat_template.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "io/mapped_file.h"
#include "io/strict_json.h"

namespace distill {

namespace {

constexpr std::string_view choices = "qwen2_5, qwen3, chatml, llama3, empty";

// Templates as their models are published with. qwen2 and smollm2 are ChatML with another default system message.
struct Known {
  std::uint64_t fingerprint;
  std::string_view name;
};
constexpr std::array<Known, 8> known = {{
    {0x11d394755cef9355u, "qwen2_5"},
    {0xabb815b933a4981au, "qwen3"},
    {0x88bf4138d5c826f0u, "chatml"},
    {0x0e60067a5537498eu, "llama3"},
    {0x8a87094e0e1e24c5u, "qwen2"},
    {0x45ec583d4d25bc3au, "smollm2"},
    {0x4fd30286bc0da17cu, "llama3_1"},  // and 3.3
    {0x1a6da26e3aef1b34u, "llama3_1"},  // Llama 3.2
}};

// The text of the tokenizer's template.
std::string native_template(const std::filesystem::path& folder, std::string& where) {
  std::error_code ignored;
  if (const auto file = folder / "chat_template.jinja"; std::filesystem::exists(file, ignored)) {
    where = file.string();
    return std::string(MappedFile(where).bytes());
  }
  const auto file = folder / "tokenizer_config.json";
  where = text(file.string(), ": chat_template");
  check_input(std::filesystem::exists(file, ignored), folder.string(),
              ": has no chat template (neither chat_template.jinja nor tokenizer_config.json): set ",
              "data_args.template to one of ", choices);
  const auto json = read_strict_json(file.string());
  check_input(json.is_object(), file.string(), ": is not a JSON object");
  const auto found = json.find("chat_template");
  check_input(found != json.end() && !found->is_null(), file.string(),
              ": has no chat_template: set data_args.template to one of ", choices);
  if (found->is_string()) return found->get<std::string>();
  // Several templates: the one named default is for conversations.
  const auto is_text = [](const auto& entry, const char* key) {
    return entry.is_object() && entry.contains(key) && entry[key].is_string();
  };
  if (found->is_array())
    for (const auto& entry : *found)
      if (is_text(entry, "name") && entry["name"] == "default" && is_text(entry, "template"))
        return entry["template"].get<std::string>();
  fail_input(where, ": expected a text, or a list of {name, template} with one named default");
}

// Without the white space at both ends that Python's str.strip removes.
std::string_view strip(std::string_view s) {
  constexpr std::array<std::string_view, 29> spaces = {
      " ",      "\t",     "\n",     "\r",     "\x0b",   "\x0c",   "\x1c",   "\x1d",   "\x1e",   "\x1f",
      "\u0085", "\u00a0", "\u1680", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005", "\u2006",
      "\u2007", "\u2008", "\u2009", "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"};
  for (bool found = true; found;) {
    found = false;
    for (const std::string_view space : spaces) {
      if (s.starts_with(space)) {
        s.remove_prefix(space.size());
        found = true;
      }
      if (s.ends_with(space)) {
        s.remove_suffix(space.size());
        found = true;
      }
    }
  }
  return s;
}

std::string_view strip_line_breaks_left(std::string_view s) {
  while (s.starts_with('\n')) s.remove_prefix(1);
  return s;
}
std::string_view strip_line_breaks_right(std::string_view s) {
  while (s.ends_with('\n')) s.remove_suffix(1);
  return s;
}

void append_turn(std::string& out, std::string_view role, std::string_view content) {
  out.append("<|im_start|>").append(role).append("\n").append(content).append("<|im_end|>\n");
}

std::string render_chatml(std::span<const Message> conversation, std::string_view default_system,
                          bool add_generation_prompt) {
  std::string out;
  if (!default_system.empty() && (conversation.empty() || conversation.front().role != "system"))
    append_turn(out, "system", default_system);
  for (const Message& message : conversation) append_turn(out, message.role, message.content);
  if (add_generation_prompt) out += "<|im_start|>assistant\n";
  return out;
}

// What the assistant thought and what it said.
struct Thought {
  std::string_view reasoning, content;
};
Thought split_thought(std::string_view content) {
  constexpr std::string_view begin = "<think>", end = "</think>";
  const std::size_t first_end = content.find(end);
  if (first_end == std::string_view::npos) return {"", content};
  std::string_view reasoning = strip_line_breaks_right(content.substr(0, first_end));
  if (const std::size_t last_begin = reasoning.rfind(begin); last_begin != std::string_view::npos)
    reasoning.remove_prefix(last_begin + begin.size());
  return {strip_line_breaks_left(reasoning), strip_line_breaks_left(content.substr(content.rfind(end) + end.size()))};
}

// Only what the assistant says after the last question keeps its reasoning; the last message always shows where it
// stood.
std::string render_qwen3(std::span<const Message> conversation, bool add_generation_prompt) {
  std::size_t last_question = conversation.empty() ? 0 : conversation.size() - 1;
  for (std::size_t i = conversation.size(); i-- > 0;) {
    const Message& m = conversation[i];
    if (m.role == "user" && !(m.content.starts_with("<tool_response>") && m.content.ends_with("</tool_response>"))) {
      last_question = i;
      break;
    }
  }
  std::string out;
  for (std::size_t i = 0; i < conversation.size(); ++i) {
    const Message& m = conversation[i];
    if (m.role != "assistant") {
      append_turn(out, m.role, m.content);
      continue;
    }
    const Thought thought = split_thought(m.content);
    std::string said;
    if (i > last_question && (i + 1 == conversation.size() || !thought.reasoning.empty()))
      said.append("<think>\n")
          .append(strip_line_breaks_left(strip_line_breaks_right(thought.reasoning)))
          .append("\n</think>\n\n")
          .append(strip_line_breaks_left(thought.content));
    else
      said = thought.content;
    append_turn(out, m.role, said);
  }
  if (add_generation_prompt) out += "<|im_start|>assistant\n";
  return out;
}

void append_llama3(std::string& out, const Message& m) {
  out.append("<|start_header_id|>")
      .append(m.role)
      .append("<|end_header_id|>\n\n")
      .append(strip(m.content))
      .append("<|eot_id|>");
}

std::string render_llama3(std::span<const Message> conversation, bool add_generation_prompt) {
  std::string out = conversation.empty() ? "" : "<|begin_of_text|>";
  for (const Message& m : conversation) append_llama3(out, m);
  if (add_generation_prompt) out += "<|start_header_id|>assistant<|end_header_id|>\n\n";
  return out;
}

// There is always a system block, and it begins with dates. Llama 3.2 asks for today's; the one it falls back to serves
// here, so that a run gives the same tokens on any day.
std::string render_llama3_1(std::span<const Message> conversation, bool add_generation_prompt) {
  std::string_view system;
  if (!conversation.empty() && conversation.front().role == "system") {
    system = strip(conversation.front().content);
    conversation = conversation.subspan(1);
  }
  std::string out =
      "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
      "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";
  out.append(system).append("<|eot_id|>");
  for (const Message& m : conversation) append_llama3(out, m);
  if (add_generation_prompt) out += "<|start_header_id|>assistant<|end_header_id|>\n\n";
  return out;
}

// No markup: what comes before the answer ends with a line break where it is a system message, the answer follows the
// question.
std::string render_empty(std::span<const Message> conversation) {
  std::string out;
  for (const Message& m : conversation) {
    out += m.content;
    if (m.role == "system") out += '\n';
  }
  return out;
}

}  // namespace

ChatTemplate ChatTemplate::named(std::string_view name) {
  ChatTemplate t;
  if (name == "qwen2_5") t.default_system_ = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.";
  if (name == "qwen2") t.default_system_ = "You are a helpful assistant.";
  if (name == "smollm2") t.default_system_ = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
  if (name == "qwen3") t.family_ = Family::qwen3;
  if (name == "llama3") t.family_ = Family::llama3;
  if (name == "llama3_1") t.family_ = Family::llama3_1;
  if (name == "empty") t.family_ = Family::empty;
  return t;
}

// FNV-1a (Fowler, Noll & Vo) of a template's text. Inside a Jinja string a line break may be written as one or as \n,
// and an editor may add one at the end: neither changes what is rendered.
std::uint64_t ChatTemplate::fingerprint(std::string_view jinja) {
  while (!jinja.empty() && (jinja.back() == '\n' || jinja.back() == ' ')) jinja.remove_suffix(1);
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (std::size_t i = 0; i < jinja.size(); ++i) {
    char c = jinja[i];
    if (c == '\\' && i + 1 < jinja.size() && jinja[i + 1] == 'n') {
      c = '\n';
      ++i;
    }
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  }
  return hash;
}

std::optional<ChatTemplate> ChatTemplate::of_fingerprint(std::uint64_t mark) {
  const auto it = std::find_if(known.begin(), known.end(), [&](const Known& k) { return k.fingerprint == mark; });
  return it == known.end() ? std::nullopt : std::optional(named(it->name));
}

ChatTemplate ChatTemplate::recognise(std::string_view jinja, const std::string& where) {
  const std::optional<ChatTemplate> found = of_fingerprint(fingerprint(jinja));
  check_input(found.has_value(), where, ": is not a chat template that is known here (", jinja.size(),
              " bytes that begin \"", jinja.substr(0, 40), "\"): set data_args.template to one of ", choices,
              jinja.find("Cutting Knowledge") == jinja.npos ? "" : " (llama3 lacks the dates that this one writes)");
  return *found;
}

ChatTemplate ChatTemplate::load(const std::string& name, const std::string& folder) {
  if (name != "native") return named(name);
  std::string where;
  const std::string jinja = native_template(folder, where);
  return recognise(jinja, where);
}

std::string ChatTemplate::identity() const { return text("family ", int(family_), ", system: ", default_system_); }

std::string ChatTemplate::render(std::span<const Message> conversation, bool add_generation_prompt) const {
  switch (family_) {
    case Family::chatml:
      return render_chatml(conversation, default_system_, add_generation_prompt);
    case Family::qwen3:
      return render_qwen3(conversation, add_generation_prompt);
    case Family::llama3:
      return render_llama3(conversation, add_generation_prompt);
    case Family::llama3_1:
      return render_llama3_1(conversation, add_generation_prompt);
    case Family::empty:
      return render_empty(conversation);
  }
  return {};
}

}  // namespace distill
