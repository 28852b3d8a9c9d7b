#include "io/tokenizer.h"

#include <catch2/catch.hpp>
#include <cstring>
#include <fstream>
#include <future>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>

#include "io/utf8.h"
#include "test/support/hostile.h"
#include "test/support/refusal.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using distill::test::ScratchFolder;
using nlohmann::json;

namespace {

using Ids = std::vector<std::int32_t>;
using Blob = std::vector<std::string>;

const std::string golden_folder = DISTILL_BINARY_DIR "/golden/tokenizers/";

std::string read_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  REQUIRE(in);
  return {std::istreambuf_iterator<char>(in), {}};
}

template <class Value>
std::vector<Value> values_of(std::string_view bytes) {
  std::vector<Value> values(bytes.size() / sizeof(Value));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(Value));
  return values;
}

// [u32 size][bytes] …
Blob read_blob(const std::string& name) {
  const std::string bytes = read_bytes(golden_folder + name);
  Blob parts;
  for (std::size_t at = 0; at < bytes.size();) {
    const std::uint32_t size = values_of<std::uint32_t>(std::string_view(bytes).substr(at, 4))[0];
    parts.push_back(bytes.substr(at + 4, size));
    at += 4 + size;
  }
  return parts;
}

const Blob& strings() {
  static const Blob all = read_blob("strings");
  return all;
}

std::uint32_t hash_of(const Ids& ids) {
  std::uint32_t hash = 0x811c9dc5u;
  for (const std::int32_t id : ids)
    for (int shift = 0; shift < 32; shift += 8)
      hash = (hash ^ (static_cast<std::uint32_t>(id) >> shift & 0xff)) * 0x01000193u;
  return hash;
}

std::string escaped(const std::string& bytes) {
  return json(bytes.substr(0, 400)).dump(-1, ' ', true, json::error_handler_t::replace);
}

// Compares with NAME.ids, where ids are stored in full, and NAME.hash. Says a few of the strings that differ.
void check_ids(const Tokenizer& tokenizer, const std::string& name) {
  const Blob full = read_blob(name + ".ids");
  const auto hashes = values_of<std::uint32_t>(read_bytes(golden_folder + name + ".hash"));
  REQUIRE(!full.empty());
  REQUIRE(hashes.size() >= full.size());
  int wrong = 0;
  for (std::size_t i = 0; i < hashes.size(); ++i) {
    const Ids ids = tokenizer.encode(strings().at(i));
    if (hash_of(ids) == hashes[i] || ++wrong > 5) continue;
    INFO(name << ", string " << i << ": " << escaped(strings()[i]));
    if (i < full.size())
      CHECK(ids == values_of<std::int32_t>(full[i]));
    else
      FAIL_CHECK("the ids differ from those of the reference: " << Catch::Detail::stringify(ids).substr(0, 1000));
  }
  CHECK(wrong == 0);
}

// NAME.decoded: ids, their text, their text without special tokens, and so on.
void check_decoding(const Tokenizer& tokenizer, const std::string& name) {
  const Blob golden = read_blob(name + ".decoded");
  REQUIRE(golden.size() % 3 == 0);
  REQUIRE(!golden.empty());
  for (std::size_t i = 0; i < golden.size(); i += 3) {
    const Ids ids = values_of<std::int32_t>(golden[i]);
    INFO(name << ", ids " << Catch::Detail::stringify(ids));
    CHECK(tokenizer.decode(ids, false) == golden[i + 1]);
    CHECK(tokenizer.decode(ids, true) == golden[i + 2]);
  }
}

// NAME.code_points: [u32 first code point of 256][u32 hash of the ids of a text with each of them].
void check_code_points(const Tokenizer& tokenizer, const std::string& name) {
  const auto golden = values_of<std::uint32_t>(read_bytes(golden_folder + name + ".code_points"));
  REQUIRE(golden.size() > 1000);
  for (std::size_t i = 0; i < golden.size(); i += 2) {
    std::string text;
    for (char32_t c = golden[i]; c < golden[i] + 256; ++c)
      for (const char32_t part : {U' ', U'a', c, U'b', c, U'1', U'\n'}) append_utf8(text, part);
    INFO(name << ", code points from " << std::hex << golden[i]);
    if (hash_of(tokenizer.encode(text)) != golden[i + 1]) FAIL_CHECK("the ids differ from those of the reference");
  }
}

// A small tokenizer, complete but for added tokens.
json tiny() {
  return json::parse(R"({
    "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
    "post_processor": null,
    "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
    "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
              "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
              "vocab": {"a": 0, "b": 1, "c": 2, "Ġ": 3, "ab": 4, "Ġab": 5, "Ã": 6, "©": 7},
              "merges": ["a b", "Ġ ab"]}})");
}

json tiny_with(const json& patch) {
  json content = tiny();
  content.merge_patch(patch);
  return content;
}

Tokenizer load(const json& content) {
  const ScratchFolder folder;
  folder.write("tokenizer.json", content.dump());
  return Tokenizer::load(folder.path());
}

json added(const std::string& content, int id, bool special = true) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", special}};
}

}  // namespace

TEST_CASE("ids of a GPT-2 style tokenizer: prefix space, added tokens of all kinds", "[tokenizer]") {
  const Tokenizer tokenizer = Tokenizer::load(golden_folder + "gpt2_style.json");
  check_ids(tokenizer, "gpt2_style");
  check_decoding(tokenizer, "gpt2_style");
}

TEST_CASE("ids of a Llama 3 style tokenizer: ignore_merges, merges as pairs", "[tokenizer]") {
  const Tokenizer tokenizer = Tokenizer::load(golden_folder + "llama3_style.json");
  check_ids(tokenizer, "llama3_style");
  check_decoding(tokenizer, "llama3_style");
}

TEST_CASE("ids of SmolLM2: individual digits, bytes missing in the vocabulary", "[tokenizer]") {
  const Tokenizer tokenizer = Tokenizer::load(golden_folder + "smollm2.json");
  CHECK(tokenizer.vocabulary_size() == 49152);
  check_ids(tokenizer, "smollm2");
  check_decoding(tokenizer, "smollm2");
  check_code_points(tokenizer, "smollm2");
}

TEST_CASE("ids of Qwen2.5, merges as strings", "[tokenizer]") {
  const Tokenizer tokenizer = Tokenizer::load(golden_folder + "qwen2.5.json");
  CHECK(tokenizer.vocabulary_size() == 151665);
  CHECK(tokenizer.id_of("<|im_end|>") == 151645);
  CHECK(tokenizer.token_of(151645) == "<|im_end|>");
  CHECK(tokenizer.id_of("Ġthe") == 279);
  CHECK(!tokenizer.id_of("no such token"));
  CHECK(!tokenizer.token_of(151665));
  CHECK(!tokenizer.token_of(-1));
  check_ids(tokenizer, "qwen2.5");
  check_decoding(tokenizer, "qwen2.5");
  check_code_points(tokenizer, "qwen2.5");

  // Another witness: the test vectors of llama.cpp.
  const std::string folder = DISTILL_SOURCE_DIR "/test/golden/tokenizers/";
  std::string texts = read_bytes(folder + "llama_cpp_qwen2.inp");
  std::istringstream lines(read_bytes(folder + "llama_cpp_qwen2.out"));
  const std::string separator = "\n__ggml_vocab_test__\n";
  int vectors = 0;
  for (std::string line; std::getline(lines, line); ++vectors) {
    const std::size_t end = texts.find(separator);
    const std::string text = texts.substr(0, end);
    texts.erase(0, end == std::string::npos ? end : end + separator.size());
    std::istringstream numbers(line);
    INFO(escaped(text));
    CHECK(tokenizer.encode(text) == Ids(std::istream_iterator<std::int32_t>(numbers), {}));
  }
  CHECK(vectors == 46);
}

TEST_CASE("ids of Qwen3, merges as pairs, and how it differs from Qwen2.5", "[tokenizer]") {
  json content = json::parse(read_bytes(golden_folder + "qwen2.5.json"));
  content["added_tokens"] = json::parse(read_bytes(golden_folder + "qwen3.added_tokens.json"));
  for (json& merge : content["model"]["merges"]) {
    const std::string both = merge;
    merge = {both.substr(0, both.find(' ')), both.substr(both.find(' ') + 1)};
  }
  const Tokenizer tokenizer = load(content);
  CHECK(tokenizer.vocabulary_size() == 151669);
  check_ids(tokenizer, "qwen3");
  check_decoding(tokenizer, "qwen3");
  const std::string difference = first_difference(Tokenizer::load(golden_folder + "qwen2.5.json"), tokenizer);
  CHECK(
      difference.starts_with("id 151665 is no token in " + golden_folder + "qwen2.5.json and \"<tool_response>\" in "));
}

TEST_CASE("every kind of step, behaviour and field that is supported", "[tokenizer]") {
  const json base = json::parse(read_bytes(golden_folder + "gpt2_style.json"));
  const json variants = json::parse(read_bytes(golden_folder + "variants.json"));
  REQUIRE(variants.size() >= 20);
  for (const auto& [name, patch] : variants.items()) {
    json content = base;
    content.merge_patch(patch);
    check_ids(load(content), "variant." + name);
  }
}

TEST_CASE("many threads share a tokenizer", "[tokenizer][threads]") {
  const Tokenizer tokenizer = Tokenizer::load(golden_folder + "llama3_style.json");
  const auto encode_some = [&](std::size_t first) {
    std::uint32_t sum = 0;
    for (std::size_t i = 0; i < 2000; ++i) sum += hash_of(tokenizer.encode(strings().at((first + i) % 2000)));
    return sum;
  };
  strings();
  std::vector<std::future<std::uint32_t>> sums;
  for (std::size_t thread = 0; thread < 4; ++thread)
    sums.push_back(std::async(std::launch::async, encode_some, thread * 500));
  const std::uint32_t expected = encode_some(0);
  for (auto& sum : sums) CHECK(sum.get() == expected);
}

TEST_CASE("bytes that are not UTF-8 are read as U+FFFD, in text and in decoding", "[tokenizer]") {
  const Tokenizer tokenizer = Tokenizer::load(golden_folder + "llama3_style.json");
  const auto same = [&](const std::string& bytes, const std::string& text) {
    INFO(escaped(bytes));
    CHECK(replace_invalid_utf8(bytes) == text);
    CHECK(tokenizer.encode(bytes) == tokenizer.encode(text));
  };
  same(
      "a\xff"
      "b",
      "a\ufffd"
      "b");
  same("\xed\xa0\x80", "\ufffd\ufffd\ufffd");  // a surrogate
  same("\xf0\x9f\x98", "\ufffd");              // a character cut short
  same(
      "\xf0\x9f\x98"
      "a",
      "\ufffd"
      "a");
  same("\xc0\xaf", "\ufffd\ufffd");  // an overlong form
  same("\xf4\x90\x80\x80", "\ufffd\ufffd\ufffd\ufffd");
  same(std::string("\0\x80", 2), std::string("\0\ufffd", 4));

  const Tokenizer bytes = load(tiny());
  CHECK(bytes.decode(Ids{6, 7}, false) == "é");
  CHECK(bytes.decode(Ids{7, 6}, false) == "\ufffd\ufffd");
  CHECK(bytes.decode(Ids{0, 100, -1, 1}, false) == "ab");  // ids without a token
}

TEST_CASE("texts of 300 kB take no longer than their size", "[tokenizer]") {
  const Tokenizer tokenizer = Tokenizer::load(golden_folder + "llama3_style.json");
  const auto times = [](const std::string& part, std::size_t bytes) {
    std::string text;
    while (text.size() < bytes) text += part;
    return text;
  };
  const Tokenizer normalizing = load(tiny_with({{"normalizer", {{"type", "NFC"}}}}));
  for (const char* part : {"a", " ", "ab", "\n ", "1", "!", "é", "\u0300\u0316", "<|eot_id|>", "<|"}) {
    INFO(part);
    CHECK(tokenizer.decode(tokenizer.encode(times(part, 300000)), false) == times(part, 300000));
    CHECK(normalizing.encode(times(part, 300000)).size() < 600000);
  }
}

TEST_CASE("special tokens are recognised in text and left out on demand", "[tokenizer]") {
  const Tokenizer tokenizer =
      load(tiny_with({{"added_tokens", {added("<s>", 8), added("<t>", 9, false), added("<s>x", 10)}}}));
  CHECK(tokenizer.vocabulary_size() == 11);
  CHECK(tokenizer.encode("ab<s> ab<t><s>xc<s") ==
        Ids{4, 8, 5, 9, 10, 2});  // the bytes of "<s" are not in the vocabulary
  CHECK(tokenizer.decode(Ids{4, 8, 5, 9}, false) == "ab<s> ab<t>");
  CHECK(tokenizer.decode(Ids{4, 8, 5, 9}, true) == "ab ab<t>");
  CHECK(tokenizer.encode("").empty());
}

TEST_CASE("two tokenizers are compared by what changes ids", "[tokenizer]") {
  const ScratchFolder folder;
  const auto difference = [&](const json& patch) {
    folder.write("a.json", tiny().dump());
    folder.write("b.json", tiny_with(patch).dump());
    return test::without(
        first_difference(Tokenizer::load(folder.path("a.json")), Tokenizer::load(folder.path("b.json"))),
        folder.path());
  };
  CHECK(difference(json::object()) == "");
  // The same step, written as a list of one.
  CHECK(difference({{"pre_tokenizer",
                     {{"type", "Sequence"}, {"pretokenizers", json::array({tiny()["pre_tokenizer"]})}}}}) == "");
  CHECK(difference({{"padding", {{"length", 3}}}, {"post_processor", {{"type", "ByteLevel"}}}}) == "");
  CHECK(difference({{"model", {{"vocab", {{"x", 8}}}}}}) == "id 8 is no token in a.json and \"x\" in b.json");
  CHECK(difference({{"model", {{"vocab", {{"b", 2}, {"c", 1}}}}}}) == "id 1 is \"b\" in a.json and \"c\" in b.json");
  CHECK(difference({{"model", {{"merges", {"a b"}}}}}) == "merge 1 is \"Ġ ab\" in a.json and absent in b.json");
  CHECK(difference({{"model", {{"merges", {"Ġ ab", "a b"}}}}}) ==
        "merge 0 is \"a b\" in a.json and \"Ġ ab\" in b.json");
  CHECK(difference({{"normalizer", {{"type", "NFC"}}}}) == "normalizer differs between a.json and b.json");
  CHECK(difference({{"pre_tokenizer", {{"use_regex", false}}}}) == "pre_tokenizer differs between a.json and b.json");
  CHECK(difference({{"added_tokens", {added("ab", 4)}}}) == "added_tokens differs between a.json and b.json");
  CHECK(difference({{"model", {{"ignore_merges", true}}}}) == "model.ignore_merges differs between a.json and b.json");
  CHECK(difference({{"model", {{"unk_token", "c"}}}}) ==
        "model.unk_token or model.fuse_unk differs between a.json and b.json");
}

TEST_CASE("what is missing, damaged or not supported is named", "[tokenizer]") {
  const ScratchFolder folder;
  const auto refused = [&](const json& content) {
    folder.write("tokenizer.json", content.is_string() ? content.get<std::string>() : content.dump());
    return test::refusal(folder.path(), [&] { Tokenizer::load(folder.path()); });
  };
  const auto complaint = [&](const json& patch) {
    const std::string message = refused(tiny_with(patch));
    REQUIRE(message.starts_with("tokenizer.json: "));
    return message.substr(16);
  };
  CHECK(test::refusal(folder.path(), [&] { Tokenizer::load(folder.path()); }) ==
        "tokenizer.json: cannot open: No such file or directory");
  CHECK(refused("{\"a\": \n[1, 2").starts_with("tokenizer.json: not valid JSON: line 2, column 6: "));
  CHECK(refused("{\"a\": \"1e999 \\\" 1e999\",\n \"b\": -1e999}") ==
        "tokenizer.json: not valid JSON: line 2, column 12: number overflow parsing '-1e999'");
  CHECK(refused("").starts_with("tokenizer.json: not valid JSON: line 1, column 1: "));
  CHECK(refused(R"({"a": "\ud800"})").starts_with("tokenizer.json: not valid JSON: line 1, column 14: "));
  CHECK(refused(json::array()) == "tokenizer.json: is array, expected an object");

  CHECK(complaint({{"version", "2.0"}}) == "version: \"2.0\" is not supported, only \"1.0\"");
  CHECK(complaint({{"normalizer", {{"type", "NFKC"}}}}) == "normalizer: \"NFKC\" is not supported, only NFC or null");
  CHECK(complaint({{"normalizer", {{"kind", 1}}}}) == "normalizer.type: is missing or null, expected a string");
  CHECK(complaint({{"decoder", {{"type", "Metaspace"}}}}) == "decoder: \"Metaspace\" is not supported, only ByteLevel");
  json wordless = tiny();
  wordless["model"]["vocab"] = json::object();
  CHECK(refused(wordless) == "tokenizer.json: model.vocab: is empty");
  CHECK(complaint({{"decoder", nullptr}}) == "decoder: is missing or null, expected an object");

  CHECK(complaint({{"pre_tokenizer", nullptr}}) == "pre_tokenizer: is missing or null, expected an object");
  CHECK(complaint({{"pre_tokenizer", {{"type", "Metaspace"}}}}) ==
        "pre_tokenizer: \"Metaspace\" is not supported, only Sequence, Split, Digits and ByteLevel");
  CHECK(complaint({{"pre_tokenizer", {{"type", "Digits"}}}}) ==
        "pre_tokenizer: has no ByteLevel: only byte-level BPE is supported");
  CHECK(complaint({{"pre_tokenizer", {{"add_prefix_space", nullptr}}}}) ==
        "pre_tokenizer.add_prefix_space: is missing or null, expected true or false");
  const json byte_level = tiny()["pre_tokenizer"];
  const auto sequence = [](const json& members) {
    return json{{"pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", members}}}};
  };
  CHECK(complaint(sequence({byte_level, {{"type", "Digits"}}})) ==
        "pre_tokenizer.pretokenizers[1]: \"Digits\" after ByteLevel is not supported");
  json split = {{"type", "Split"}, {"pattern", {{"Regex", "a(b"}}}, {"behavior", "Isolated"}, {"invert", false}};
  const std::string first = "pre_tokenizer.pretokenizers[0]";
  CHECK(complaint(sequence({split, byte_level})) ==
        first + ".pattern.Regex: bad regular expression at character 4: missing closing parenthesis");
  split["pattern"] = {{"Glob", "*"}};
  CHECK(complaint(sequence({split, byte_level})) == first + ".pattern: expected \"Regex\" or \"String\"");
  split["pattern"] = {{"Regex", 7}};
  CHECK(complaint(sequence({split, byte_level})) == first + ".pattern.Regex: is number, expected a string");
  split["pattern"] = {{"String", "x"}};
  split["behavior"] = "Doubled";
  CHECK(complaint(sequence({split, byte_level})) ==
        first +
            ".behavior: \"Doubled\" is unknown, expected Removed, Isolated, MergedWithPrevious, MergedWithNext or "
            "Contiguous");
  json nested = byte_level;
  for (int depth = 0; depth < 9; ++depth) nested = {{"type", "Sequence"}, {"pretokenizers", json::array({nested})}};
  CHECK(complaint({{"pre_tokenizer", nested}}).ends_with(": Sequence is nested too deeply"));

  const auto model = [&](const json& patch) { return complaint({{"model", patch}}); };
  CHECK(model({{"type", "WordPiece"}}) == "model.type: \"WordPiece\" is not supported, only BPE");
  CHECK(model({{"dropout", 0.1}}) == "model.dropout: is 0.1, expected null or 0");
  CHECK(model({{"continuing_subword_prefix", "##"}}) ==
        "model.continuing_subword_prefix: is not supported, expected null or \"\"");
  CHECK(model({{"end_of_word_suffix", "</w>"}}) == "model.end_of_word_suffix: is not supported, expected null or \"\"");
  CHECK(model({{"byte_fallback", true}}) == "model.byte_fallback: is not supported, expected false");
  CHECK(model({{"ignore_merges", "yes"}}) == "model.ignore_merges: is string, expected true or false");
  CHECK(model({{"unk_token", "<unk>"}}) == "model.unk_token: \"<unk>\" is not in model.vocab");
  CHECK(model({{"vocab", nullptr}}) == "model.vocab: is missing or null, expected an object");
  CHECK(model({{"vocab", {{"a", -1}}}}) == "model.vocab[\"a\"]: is number, expected a token id");
  CHECK(model({{"vocab", {{"a", 1.5}}}}) == "model.vocab[\"a\"]: is number, expected a token id");
  CHECK(model({{"vocab", {{"a", 4000000000u}}}}) ==
        "model.vocab[\"a\"]: is 4000000000, expected a token id of at most 4194303");
  CHECK(model({{"vocab", {{"x", 4}}}}) == "model.vocab: id 4 is given to \"ab\" and to \"x\"");
  CHECK(complaint({{"model", {{"merges", nullptr}}}}) == "model.merges: is missing or null, expected an array");
  CHECK(model({{"merges", {"a b", "a b c"}}}) == "model.merges[1]: expected \"left right\" or [\"left\", \"right\"]");
  CHECK(model({{"merges", {"ab"}}}) == "model.merges[0]: expected \"left right\" or [\"left\", \"right\"]");
  CHECK(model({{"merges", json::array({json::array({"a", 1})})}}) ==
        "model.merges[0]: expected \"left right\" or [\"left\", \"right\"]");
  CHECK(model({{"merges", {"a x"}}}) == "model.merges[0]: token \"x\" is not in model.vocab");
  CHECK(model({{"merges", {"a c"}}}) == "model.merges[0]: token \"ac\" is not in model.vocab");

  const auto tokens = [&](const json& list) { return complaint({{"added_tokens", list}}); };
  CHECK(tokens(json::array({{{"id", 8}}})) == "added_tokens[0].content: is missing or null, expected a string");
  CHECK(tokens(json::array({added("<s>", 9)})) ==
        "added_tokens[0].id: is 9 for \"<s>\", expected 8, the first free id");
  CHECK(tokens({added("<s>", 8), added("ab", 9)}) ==
        "added_tokens[1].id: is 9 for \"ab\", expected 4, its id in model.vocab");
  CHECK(tokens({added("<s>", 8), added("<s>", 8)}) == "added_tokens[1]: \"<s>\" is there twice");
  CHECK(complaint({{"model", {{"vocab", {{"©", 8}}}}}, {"added_tokens", {added("<s>", 8)}}}) ==
        "added_tokens[0].id: is 8, which is \"©\" in model.vocab");
}

TEST_CASE("damaged files are refused or read, never more", "[tokenizer]") {
  const ScratchFolder folder;
  const std::string whole = tiny_with({{"added_tokens", {added("<s>", 8)}},
                                       {"pre_tokenizer",
                                        {{"type", "Sequence"},
                                         {"pretokenizers",
                                          {{{"type", "Split"},
                                            {"pattern", {{"Regex", R"(\p{N}{1,3}|\s+(?!\S)|(?i:'s)|[^\r\n]?\p{L}+)"}}},
                                            {"behavior", "Isolated"},
                                            {"invert", false}},
                                           tiny()["pre_tokenizer"]}}}}})
                                .dump();
  int refused = 0;
  const auto try_to_use = [&](const std::string& content) {
    folder.write("tokenizer.json", content);
    try {
      const Tokenizer tokenizer = Tokenizer::load(folder.path());
      tokenizer.decode(tokenizer.encode("ab <s>1234's \xf0\x9f\x98\x80"), true);
    } catch (const Error& error) {
      CHECK(error.code() == ExitCode::bad_input);
      ++refused;
    }
  };
  int truncations = 0;
  for (std::size_t size = 0; size < whole.size(); size += 5, ++truncations) try_to_use(whole.substr(0, size));
  CHECK(refused == truncations);
  std::mt19937 random(1);
  for (int i = 0; i < 1000; ++i) try_to_use(test::damaged(whole, random));
  CHECK(refused > truncations + 300);
}
