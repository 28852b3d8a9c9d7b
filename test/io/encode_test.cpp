#include "io/encode.h"

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <stdexcept>
#include <thread>

#include "core/error.h"

using namespace distill;
using Ids = std::vector<std::int32_t>;

namespace {

// One token a byte, so that token sequences read as text.
Ids encode_bytes(std::string_view source) { return {source.begin(), source.end()}; }

// "<user:…>\n" a turn; the generation prompt opens the assistant's.
std::string render_turns(std::span<const Message> conversation, bool add_generation_prompt) {
  std::string out;
  for (const Message& m : conversation) out += text("<", m.role, ":", m.content, ">\n");
  return add_generation_prompt ? out + "<assistant:" : out;
}

std::string text_of(std::span<const std::int32_t> tokens) { return {tokens.begin(), tokens.end()}; }

Record qa(std::string question, std::string answer) { return {"", "", std::move(question), std::move(answer)}; }

EncodedRecords encode(const std::vector<Record>& records, const EncodeOptions& options = {}) {
  return encode_records(records, encode_bytes, render_turns, options);
}

}  // namespace

TEST_CASE("a record becomes a conversation; labels begin after the rendered prompt", "[encode]") {
  const EncodedRecords encoded = encode({qa("Q", "A"), {"S", "P", "Q", "A"}});
  REQUIRE(encoded.samples.size() == 2);
  CHECK(text_of(encoded.samples[0].tokens) == "<user:Q>\n<assistant:A>");  // one line break removed at the end
  CHECK(encoded.samples[0].prompt_length == 20);
  CHECK(encoded.samples[0].supervised() == 2);  // "A" and ">"
  CHECK(text_of(encoded.samples[1].tokens) == "<system:S>\n<user:P\nQ>\n<assistant:A>");
  CHECK(encoded.samples[1].prompt_length == 33);
  CHECK(encoded.truncated == 0);
  CHECK(encoded.left_out == 0);
}

TEST_CASE("only one line break is removed at the end, and only a line break", "[encode]") {
  const auto full_text = [](std::string rendered) {
    const RenderChat render = [&](std::span<const Message>, bool prompt) {
      return prompt ? std::string("x") : rendered;
    };
    return text_of(encode_records({qa("", "")}, encode_bytes, render, {}).samples[0].tokens);
  };
  CHECK(full_text("xy\n\n") == "xy\n");
  CHECK(full_text("xy ") == "xy ");
  CHECK(full_text("xy") == "xy");
}

TEST_CASE("with distill_on_prompt every token is a label", "[encode]") {
  EncodeOptions options;
  options.distill_on_prompt = true;
  options.sequence_length = 10;
  const EncodedRecords encoded = encode({qa("question", "A")}, options);
  CHECK(encoded.samples[0].prompt_length == 0);
  CHECK(encoded.samples[0].tokens.size() == 10);
  CHECK(encoded.samples[0].supervised() == 9);
}

TEST_CASE("long records are truncated at the end, those left without a supervised position are left out", "[encode]") {
  EncodeOptions options;
  options.sequence_length = 21;
  // The prompt "<user:Q>\n<assistant:" has 20 tokens; each character of the question adds one.
  const EncodedRecords encoded =
      encode({qa("Q", "A"), qa("", "A"), qa("Q", ""), qa("Q2", "A"), qa("a long question", "A")}, options);
  REQUIRE(encoded.samples.size() == 3);
  CHECK(text_of(encoded.samples[0].tokens) == "<user:Q>\n<assistant:A");  // one label is left
  CHECK(encoded.samples[0].supervised() == 1);
  CHECK(text_of(encoded.samples[1].tokens) == "<user:>\n<assistant:A>");  // fits exactly
  CHECK(text_of(encoded.samples[2].tokens) == "<user:Q>\n<assistant:>");
  CHECK(encoded.truncated == 3);
  CHECK(encoded.left_out == 2);
}

TEST_CASE("an answer that encodes to nothing is left out", "[encode]") {
  const RenderChat render = [](std::span<const Message> conversation, bool) {
    return std::string(conversation[0].content);
  };
  const RenderChat answer_only = [](std::span<const Message> conversation, bool) {
    return std::string(conversation[0].content) + (conversation.size() > 1 ? std::string(conversation[1].content) : "");
  };
  CHECK(encode_records({qa("Q", ""), qa("Q", "A")}, encode_bytes, answer_only, {}).left_out == 1);
  const EncodedRecords none = encode_records({qa("Q", "A")}, encode_bytes, render, {});
  CHECK(none.left_out == 1);
  CHECK(none.samples.size() == 0);
}

TEST_CASE("the result does not depend on the number of threads", "[encode]") {
  std::vector<Record> records;
  for (int i = 0; i < 3000; ++i) records.push_back(qa(text("q", i), std::string(std::size_t(i % 50), 'a')));
  EncodeOptions options;
  options.sequence_length = 40;
  const EncodedRecords alone = encode(records, options);
  for (const int threads : {2, 5, 64}) {
    options.threads = threads;
    const EncodedRecords together = encode(records, options);
    CHECK(std::ranges::equal(together.samples.tokens(), alone.samples.tokens()));
    CHECK(std::ranges::equal(together.samples.offsets(), alone.samples.offsets()));
    CHECK(std::ranges::equal(together.samples.prompt_lengths(), alone.samples.prompt_lengths()));
    CHECK(together.truncated == alone.truncated);
    CHECK(together.left_out == alone.left_out);
  }
}

TEST_CASE("progress is told from the calling thread and ends with all", "[encode]") {
  const std::vector<Record> records(600, qa("Q", "A"));
  std::vector<std::int64_t> told;
  EncodeOptions options;
  options.threads = 2;
  const std::thread::id caller = std::this_thread::get_id();
  options.progress = [&](std::int64_t done, std::int64_t total) {
    CHECK(std::this_thread::get_id() == caller);
    CHECK(total == 600);
    told.push_back(done);
  };
  const EncodeText slow = [](std::string_view source) {
    std::this_thread::sleep_for(std::chrono::microseconds(300));
    return encode_bytes(source);
  };
  encode_records(records, slow, render_turns, options);
  REQUIRE(!told.empty());
  CHECK(std::is_sorted(told.begin(), told.end()));
  CHECK(told.back() == 600);
}

TEST_CASE("an exception in a thread reaches the caller and stops the others", "[encode]") {
  const std::vector<Record> records(100000, qa("Q", "A"));
  std::atomic<int> calls{0};
  const EncodeText failing = [&](std::string_view source) {
    if (++calls == 10) throw std::runtime_error("cannot encode");
    return encode_bytes(source);
  };
  EncodeOptions options;
  options.threads = 3;
  CHECK_THROWS_WITH(encode_records(records, failing, render_turns, options), "cannot encode");
  CHECK(calls < 100000);
}
