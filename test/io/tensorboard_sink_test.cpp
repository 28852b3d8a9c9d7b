#include "io/tensorboard_sink.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>

#include "io/crc32c.h"
#include "test/support/limit.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using namespace distill::test;
namespace fs = std::filesystem;

namespace {

std::string contents(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::string hex(const std::string& bytes) {
  std::string out;
  for (const char c : bytes)
    for (const int digit : {(c >> 4) & 15, c & 15}) out += "0123456789abcdef"[digit];
  return out;
}

void no_warning(const std::string& message) { FAIL(message); }

// --- a decoder that shares nothing with the writer: checksums bit by bit, protobuf by its wire format

std::uint32_t masked(const std::string& bytes) {
  std::uint32_t crc = 0xffffffff;
  for (const char c : bytes) {
    crc ^= std::uint8_t(c);
    for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? (crc >> 1) ^ 0x82f63b78 : crc >> 1;
  }
  crc = ~crc;
  return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

template <class T>
T number(const std::string& bytes, std::size_t at) {
  T value;
  REQUIRE(at + sizeof value <= bytes.size());
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

std::vector<std::string> records(const std::string& file) {
  std::vector<std::string> out;
  for (std::size_t at = 0; at < file.size();) {
    const auto size = number<std::uint64_t>(file, at);
    REQUIRE(number<std::uint32_t>(file, at + 8) == masked(file.substr(at, 8)));
    out.push_back(file.substr(at + 12, size));
    REQUIRE(out.back().size() == size);
    REQUIRE(number<std::uint32_t>(file, at + 12 + size) == masked(out.back()));
    at += 16 + size;
  }
  return out;
}

// Fields of a message in their order; numbers as the bytes of 64 bits.
std::multimap<int, std::string> fields(const std::string& message) {
  std::multimap<int, std::string> out;
  std::size_t at = 0;
  const auto varint = [&] {
    std::uint64_t value = 0;
    for (int shift = 0;; shift += 7) {
      const auto byte = std::uint8_t(message.at(at++));
      value |= std::uint64_t(byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
  };
  while (at < message.size()) {
    const std::uint64_t key = varint();
    std::string value;
    if (key % 8 == 0) {
      const std::uint64_t n = varint();
      value.assign(reinterpret_cast<const char*>(&n), sizeof n);
    } else {
      REQUIRE((key % 8 == 1 || key % 8 == 2 || key % 8 == 5));
      const std::size_t size = key % 8 == 2 ? varint() : key % 8 == 1 ? 8 : 4;
      value = message.substr(at, size);
      REQUIRE(value.size() == size);
      at += size;
    }
    out.emplace(int(key / 8), value);
  }
  return out;
}

struct Scalars {
  double wall_time;
  std::int64_t step;
  std::map<std::string, float> values;
};

Scalars scalars(const std::string& event) {
  const auto outer = fields(event);
  Scalars out{number<double>(outer.find(1)->second, 0), number<std::int64_t>(outer.find(2)->second, 0), {}};
  for (const auto& [field, value] : fields(outer.find(5)->second)) {
    CHECK(field == 1);
    const auto inner = fields(value);
    out.values[inner.find(1)->second] = number<float>(inner.find(2)->second, 0);
  }
  return out;
}

}  // namespace

TEST_CASE("checksums of TensorBoard's records are CRC-32C", "[tensorboard]") {
  const auto crc = [](const std::string& bytes) { return crc32c(std::as_bytes(std::span(bytes))); };
  CHECK(crc("123456789") == 0xe3069283);  // known values: the catalogue's check value, RFC 3720 B.4
  CHECK(crc(std::string(32, '\0')) == 0x8a9136aa);
  CHECK(crc(std::string(32, '\xff')) == 0x62a8ab43);
  CHECK(masked("123456789") == std::uint32_t(((0xe3069283u >> 15) | (0xe3069283u << 17)) + 0xa282ead8u));
}

TEST_CASE("event files have the bytes that TensorBoard's own writer gives", "[tensorboard]") {
  const ScratchFolder folder;
  TensorboardSink sink(folder.path(), 300, 1700000000.25, no_warning);
  const std::string start =
      "1800000000000000a37f4b220900001040fc54d9411a0d627261696e2e4576656e743a32338d2fe9"
      "100000000000000095fbfe180900001040fc54d94110ad023a020801cb79b93b";
  CHECK(hex(contents(sink.path())) == start);
  sink.write({.step = 301, .wall_time = 1700000001.5, .values = {{"train/loss", 0.1}, {"student/lr", 5e-5}}});
  CHECK(hex(contents(sink.path())) == start +
                                          "34000000000000005e33175c0900006040fc54d94110ad022a260a110a0a747261696e2f6c6f"
                                          "737315cdcccc3d0a110a0a73747564656e742f6c721517b75138d2a0abb8");
}

TEST_CASE("event files decode to what was written", "[tensorboard]") {
  const ScratchFolder folder;
  TensorboardSink sink(folder.path(), 0, 10, no_warning);
  const double inf = std::numeric_limits<double>::infinity();
  const std::string long_name(300, 'n');  // lengths beyond one byte
  sink.write({.step = 1, .wall_time = 11.125, .values = {{"a", 1.0 / 3}, {long_name, -inf}, {"c", std::nan("")}}});
  sink.write({.step = std::int64_t(1) << 40, .wall_time = 12, .values = {{"a", 1e300}}});
  sink.write({.step = 3, .wall_time = 13, .values = {}});
  const auto all = records(contents(sink.path()));
  REQUIRE(all.size() == 5);
  CHECK(fields(all[0]).find(3)->second == "brain.Event:2");
  CHECK(number<std::int64_t>(fields(all[1]).find(2)->second, 0) == 1);
  const Scalars first = scalars(all[2]), second = scalars(all[3]);
  CHECK(first.wall_time == 11.125);
  CHECK(first.step == 1);
  CHECK(first.values.at("a") == 1.0f / 3);
  CHECK(first.values.at(long_name) == -inf);
  CHECK(std::isnan(first.values.at("c")));
  CHECK(second.step == std::int64_t(1) << 40);
  CHECK(second.values.at("a") == inf);
  CHECK(scalars(all[4]).values.empty());
}

TEST_CASE("every start has a file of its own that sorts behind the older ones, whatever the clock says",
          "[tensorboard]") {
  const ScratchFolder folder;
  folder.write("events.out.tfevents.other", "");
  std::vector<std::string> paths;
  for (const double now : {1700000000.0, 1700000000.5, 1600000000.0, 1700000010.0})
    paths.push_back(TensorboardSink(folder.path(), 0, now, no_warning).path());
  CHECK(std::is_sorted(paths.begin(), paths.end()));
  CHECK(std::adjacent_find(paths.begin(), paths.end()) == paths.end());
  CHECK(fs::path(paths[0]).filename().string().starts_with("events.out.tfevents.1700000000."));
  CHECK(fs::path(paths[3]).filename().string().starts_with("events.out.tfevents.1700000010."));
}

TEST_CASE("a full disk loses records, not the file", "[tensorboard]") {
  const ScratchFolder folder;
  int warnings = 0;
  TensorboardSink sink(folder.path(), 0, 10, [&](const std::string&) { ++warnings; });
  {
    const FileLimit full(fs::file_size(sink.path()) + 20);
    sink.write({.step = 1, .wall_time = 11, .values = {{"a", 1}}});
    sink.write({.step = 2, .wall_time = 12, .values = {{"a", 2}}});
  }
  sink.write({.step = 3, .wall_time = 13, .values = {{"a", 3}}});
  CHECK(warnings == 1);
  const auto all = records(contents(sink.path()));
  REQUIRE(all.size() == 3);
  CHECK(scalars(all[2]).step == 3);
}
