// Chat templates against the Jinja programs of the published tokenizers (tools/golden/make_chat_template_golden.py).
#include "io/chat_template.h"

#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <vector>

#include "core/error.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using namespace distill::test;

namespace {

nlohmann::json golden() {
  return nlohmann::json::parse(std::ifstream(DISTILL_SOURCE_DIR "/test/golden/chat_templates.json"));
}

std::vector<Message> messages_of(const nlohmann::json& conversation) {
  std::vector<Message> messages;
  for (const auto& m : conversation)
    messages.push_back({m["role"].get_ref<const std::string&>(), m["content"].get_ref<const std::string&>()});
  return messages;
}

}  // namespace

TEST_CASE("a tokenizer's own template is recognised and rendered as Jinja renders it", "[chat_template]") {
  const auto file = golden();
  REQUIRE(file["cases"].size() == 8);
  for (const auto& c : file["cases"]) {
    CAPTURE(c["name"]);
    // Of some templates the golden file may hold the fingerprint only.
    const auto mark = c.contains("template") ? ChatTemplate::fingerprint(c["template"].get<std::string>())
                                             : std::stoull(c["fingerprint"].get<std::string>(), nullptr, 16);
    REQUIRE(ChatTemplate::of_fingerprint(mark).has_value());
    const ChatTemplate chat = *ChatTemplate::of_fingerprint(mark);
    for (std::size_t i = 0; i < file["conversations"].size(); ++i) {
      CAPTURE(c["name"], i);
      const auto messages = messages_of(file["conversations"][i]);
      CHECK(chat.render(messages, false) == c["rendered"][i][0].get<std::string>());
      CHECK(chat.render(messages, true) == c["rendered"][i][1].get<std::string>());
    }
  }
}

TEST_CASE("templates by name are those of the families", "[chat_template]") {
  const auto file = golden();
  for (const auto& c : file["cases"]) {
    const std::string name = c["name"];
    if (name == "qwen2" || name == "smollm2" || name.starts_with("llama3.")) continue;  // no names of their own
    const ChatTemplate chat = ChatTemplate::load(name, "");
    for (std::size_t i = 0; i < file["conversations"].size(); ++i)
      CHECK(chat.render(messages_of(file["conversations"][i]), true) == c["rendered"][i][1].get<std::string>());
  }
}

TEST_CASE("the empty template writes contents only", "[chat_template]") {
  const ChatTemplate chat = ChatTemplate::load("empty", "");
  const std::vector<Message> all{{"system", "S"}, {"user", "Q"}, {"assistant", "A"}};
  CHECK(chat.render(all, false) == "S\nQA");
  CHECK(chat.render(std::span(all).first(2), true) == "S\nQ");
}

TEST_CASE("native reads chat_template.jinja, or tokenizer_config.json with one or several templates",
          "[chat_template]") {
  const auto file = golden();
  std::string chatml, qwen3;
  for (const auto& c : file["cases"]) {
    if (c["name"] == "chatml") chatml = c["template"];
    if (c["name"] == "qwen3") qwen3 = c["template"];
  }
  const std::vector<Message> question{{"user", "Q"}, {"assistant", "A"}};
  const ScratchFolder folder;
  folder.write("tokenizer_config.json", nlohmann::json{{"chat_template", chatml}}.dump());
  CHECK(ChatTemplate::load("native", folder.path()).render(question, false) ==
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n");
  folder.write(
      "tokenizer_config.json",
      nlohmann::json{
          {"chat_template", {{{"name", "tool_use"}, {"template", chatml}}, {{"name", "default"}, {"template", qwen3}}}}}
          .dump());
  CHECK_THAT(ChatTemplate::load("native", folder.path()).render(question, false), Catch::Contains("<think>"));
  folder.write("chat_template.jinja", chatml + "\n");
  CHECK_THAT(ChatTemplate::load("native", folder.path()).render(question, false), !Catch::Contains("<think>"));
}

TEST_CASE("a template that cannot be had is an error that says what to do", "[chat_template]") {
  const ScratchFolder folder;
  const auto refused = [&](const std::string& part) {
    CHECK_THROWS_AS(ChatTemplate::load("native", folder.path()), Error);
    CHECK_THROWS_WITH(ChatTemplate::load("native", folder.path()),
                      Catch::Contains(part) && Catch::Contains(folder.path()));
  };
  refused(
      "has no chat template (neither chat_template.jinja nor tokenizer_config.json): set data_args.template to one of "
      "qwen2_5");
  folder.write("tokenizer_config.json", "{");
  refused("tokenizer_config.json: not valid JSON: line 1, column 2: syntax error");
  folder.write("tokenizer_config.json", "{\n\"a\": 1, }");
  refused("tokenizer_config.json: not valid JSON: line 2, column 9: syntax error");
  folder.write("tokenizer_config.json", "[]");
  refused("tokenizer_config.json: is not a JSON object");
  folder.write("tokenizer_config.json", "{}");
  refused("has no chat_template: set data_args.template");
  folder.write("tokenizer_config.json", R"({"chat_template": [{"name": "rag", "template": "x"}]})");
  refused("with one named default");
  for (const char* damaged : {R"([{"name": 3}])", R"([{"name": "default"}])", R"([{"name": "default", "template": 3}])",
                              R"([3])", "3", R"({"name": "default", "template": "x"})"}) {
    folder.write("tokenizer_config.json", text("{\"chat_template\": ", damaged, "}"));
    refused(
        "tokenizer_config.json: chat_template: expected a text, or a list of {name, template} with one named default");
  }
  folder.write("tokenizer_config.json", R"({"chat_template": "Cutting Knowledge Date: {{ date }}"})");
  refused("llama3, empty (llama3 lacks the dates that this one writes)");
  folder.write("tokenizer_config.json", R"({"chat_template": "{{ messages }}"})");
  refused(
      "is not a chat template that is known here (14 bytes that begin \"{{ messages }}\"): set data_args.template to "
      "one of");
  std::filesystem::remove(folder.path("tokenizer_config.json"));
  std::filesystem::create_directory(folder.path("tokenizer_config.json"));
  refused("tokenizer_config.json: is a folder, expected a file");
  std::filesystem::create_directory(folder.path("chat_template.jinja"));
  refused("chat_template.jinja: is a folder, expected a file");
}
