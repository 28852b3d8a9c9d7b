// What `distill encode` keeps: it comes back as it was, its name follows whatever it depends on, and damage is seen.
#include "io/encoded_file.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <random>
#include <set>

#include "core/error.h"
#include "io/hdf5.h"
#include "test/support/hostile.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using namespace distill::test;
using Ids = std::vector<std::int32_t>;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

EncodedData sample_data(int count) {
  std::mt19937 random(5);
  SampleBuilder samples;
  for (int i = 0; i < count; ++i) {
    Ids tokens(2 + random() % 60);
    for (auto& token : tokens) token = std::int32_t(random() % 1000);
    samples.add(tokens, std::int32_t(random() % tokens.size()));
  }
  return {.samples = std::move(samples).finish(), .bad = 3, .truncated = 4, .left_out = 5};
}

std::string contents(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

bool equal(const EncodedData& a, const EncodedData& b) {
  return std::ranges::equal(a.samples.tokens(), b.samples.tokens()) &&
         std::ranges::equal(a.samples.offsets(), b.samples.offsets()) &&
         std::ranges::equal(a.samples.prompt_lengths(), b.samples.prompt_lengths()) && a.bad == b.bad &&
         a.truncated == b.truncated && a.left_out == b.left_out;
}

}  // namespace

TEST_CASE("encoded data comes back as it was written", "[encoded_file]") {
  const ScratchFolder folder;
  const std::string path = folder.path("data.h5");
  const EncodedData data = sample_data(GENERATE(1, 700));
  const std::uint64_t bytes = write_encoded(path, data);
  CHECK(bytes == fs::file_size(path));
  CHECK(equal(read_encoded(path, 1000), data));
  CHECK_FALSE(fs::exists(path + ".partial"));
  // Any HDF5 program can look into it.
  CHECK(Hdf5Reader(path).describe("tokens").rows == std::int64_t(data.samples.tokens().size()));
  CHECK(contents(path).starts_with("distill encoded data, version 1, "));
}

TEST_CASE("more tokens than one slab of the file", "[encoded_file]") {
  const ScratchFolder folder;
  SampleBuilder samples;
  Ids tokens(3'000'000);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = std::int32_t(i);
  samples.add(tokens, 7);
  const EncodedData data{.samples = std::move(samples).finish()};
  write_encoded(folder.path("data.h5"), data);
  CHECK(equal(read_encoded(folder.path("data.h5"), 3'000'000), data));
}

TEST_CASE("damage is an input error, whatever it hits", "[encoded_file]") {
  const ScratchFolder folder;
  const std::string path = folder.path("data.h5");
  write_encoded(path, sample_data(20));
  const std::string whole = contents(path);
  const auto refused = [&](const std::string& bytes) {
    folder.write("data.h5", bytes);
    try {
      read_encoded(path, 1000);
    } catch (const Error& error) {
      return error.code() == ExitCode::bad_input && std::string(error.what()).starts_with(path);
    }
    return false;
  };
  std::mt19937 random(6);
  for (int i = 0; i < 300; ++i)
    if (const std::string bytes = damaged(whole, random); bytes != whole) REQUIRE(refused(bytes));
  for (std::size_t at = 0; at < whole.size(); at += 97) {
    std::string bytes = whole;
    bytes[at] = char(bytes[at] ^ 1);
    REQUIRE(refused(bytes));
  }
  CHECK(refused(""));
  CHECK(refused("no HDF5 file"));
  folder.write("data.h5", whole);
  CHECK_THROWS_WITH(read_encoded(path, 900), Contains("expected 0 to 899"));
  std::string other = whole;
  other.replace(other.find("version 1"), 9, "version 2");
  folder.write("data.h5", other);
  CHECK_THROWS_WITH(read_encoded(path, 1000),
                    Contains("version 2") && Contains("expected \"distill encoded data, version 1"));
}

TEST_CASE("contents that contradict themselves are refused when written well", "[encoded_file]") {
  const ScratchFolder folder;
  const std::string path = folder.path("data.h5");
  const auto written = [&](const Ids& tokens, const std::vector<std::int64_t>& offsets, const Ids& prompts) {
    write_encoded(path, {.samples = Samples(tokens, offsets, prompts, nullptr)});
    read_encoded(path, 10);
  };
  CHECK_NOTHROW(written({1, 2, 3, 4}, {0, 2, 4}, {1, 2}));
  CHECK_THROWS_WITH(written({1, 2, 3, 4}, {0, 2, 3}, {1, 1}), Contains("has 4 tokens, its lengths say 3"));
  CHECK_THROWS_WITH(written({1, 2, 3, 4}, {0, 2, 4}, {1, 3}), Contains("sample 1 has 2 tokens, 3 of them prompt"));
  CHECK_THROWS_WITH(written({1, 2, 3, 4}, {0, 2, 4}, {1, -1}), Contains("sample 1"));
  CHECK_THROWS_WITH(written({1, -2, 3, 4}, {0, 2, 4}, {1, 1}), Contains("token -2: expected 0 to 9"));
}

TEST_CASE("a folder that is not there is an error that names the file", "[encoded_file]") {
  CHECK_THROWS_WITH(write_encoded("/nowhere/data.h5", sample_data(1)), Contains("/nowhere/data.h5"));
}

TEST_CASE("the key follows every word, every file's name, order and bytes", "[encoded_file]") {
  const ScratchFolder folder;
  const std::string a = folder.write("a", "first"), b = folder.write("b", "second"), c = folder.write("c", "first");
  using Words = std::vector<std::string>;
  std::set<std::string> keys;
  int count = 0;
  const auto add = [&](const Words& words, const Words& files) {
    const std::string key = encoding_key(words, files);
    CHECK(key.size() == 32);
    CHECK(key == encoding_key(words, files));
    keys.insert(key);
    ++count;
  };
  add({"x", "y"}, {a, b});
  add({"xy", ""}, {a, b});
  add({"x", "y", ""}, {a, b});
  add({"y", "x"}, {a, b});
  add({"x", "y"}, {b, a});
  add({"x", "y"}, {a});
  add({"x", "y"}, {c, b});
  for (std::size_t at = 0; at < 5; ++at) {
    std::string bytes = "first";
    bytes[at] = char(bytes[at] ^ 0x20);
    folder.write("a", bytes);
    add({"x", "y"}, {a, b});
  }
  folder.write("a", "");
  add({"x", "y"}, {a, b});
  CHECK(keys.size() == std::size_t(count));
  CHECK_THROWS_WITH(encoding_key(Words{}, Words{folder.path("missing")}), Contains("missing: cannot open"));
}
