// Records to tokens as transformers does it, with the quick start's tokenizer and its own chat template
// (tools/golden/encode_wordnet.py).
#include <catch2/catch.hpp>
#include <fstream>
#include <nlohmann/json.hpp>

#include "io/chat_template.h"
#include "io/encode.h"
#include "io/tokenizer.h"

using namespace distill;
using Ids = std::vector<std::int32_t>;

TEST_CASE("records are encoded and labelled as transformers does", "[encode]") {
  const std::string source = DISTILL_SOURCE_DIR;
  const auto cases = nlohmann::json::parse(std::ifstream(source + "/test/golden/encode_wordnet.json"));
  REQUIRE(cases.size() == 29);
  const std::string folder = source + "/configs/wordnet/" + GENERATE("student", "teacher");
  const Tokenizer tokenizer = Tokenizer::load(folder);
  const ChatTemplate chat = ChatTemplate::load("native", folder);

  std::vector<Record> records;
  for (const auto& expected : cases)
    records.push_back(
        {expected.value("system", ""), expected.value("prompt", ""), expected["question"], expected["answer"]});
  const EncodedRecords encoded = encode_records(
      records, [&](std::string_view text) { return tokenizer.encode(text); },
      [&](std::span<const Message> turns, bool generate) { return chat.render(turns, generate); }, {});

  CHECK(encoded.left_out == 0);
  REQUIRE(encoded.samples.size() == std::int64_t(cases.size()));
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const SampleView sample = encoded.samples[std::int64_t(i)];
    INFO(cases[i]["question"]);
    CHECK(Ids(sample.tokens.begin(), sample.tokens.end()) == cases[i]["tokens"].get<Ids>());
    CHECK(sample.prompt_length == cases[i]["prompt_length"].get<int>());
  }
}
