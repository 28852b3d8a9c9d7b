// Conversations as text, the way a model was taught to read them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "io/message.h"

namespace distill {

class ChatTemplate {
 public:
  // By name: qwen2_5, qwen3, chatml, llama3, empty, or native, the template of the model folder's tokenizer
  // (chat_template.jinja or tokenizer_config.json). Templates are Jinja programs; those of the known families are
  // recognised by their whole text, any other is an input error that says which names can be used instead.
  static ChatTemplate load(const std::string& name, const std::string& folder);
  // The family whose Jinja template this text is; `where` is what messages call it.
  static ChatTemplate recognise(std::string_view jinja, const std::string& where);
  // The two halves of recognising: a template's text as a number, and the family that goes by that number.
  static std::uint64_t fingerprint(std::string_view jinja);
  static std::optional<ChatTemplate> of_fingerprint(std::uint64_t mark);

  // Equal where two templates render every conversation alike.
  std::string identity() const;
  // `add_generation_prompt`: ends with the start of the assistant's turn.
  std::string render(std::span<const Message> conversation, bool add_generation_prompt) const;

 private:
  enum class Family { chatml, qwen3, llama3, llama3_1, empty };
  static ChatTemplate named(std::string_view name);

  Family family_ = Family::chatml;
  std::string_view default_system_;  // chatml: spoken where the conversation has no system message
};

}  // namespace distill
