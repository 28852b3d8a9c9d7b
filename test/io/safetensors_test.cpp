#include "io/safetensors.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <filesystem>
#include <limits>

#include "io/convert.h"
#include "test/support/hostile.h"
#include "test/support/refusal.h"
#include "test/support/safetensors_bytes.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using namespace distill::test;
using Shape = std::vector<std::int64_t>;

namespace {

const std::string header =
    R"({"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},)"
    R"("a":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]},"none":{"dtype":"I64","shape":[0,4],"data_offsets":[14,14]}})";
const std::string data =
    float_bytes({1.5f, -2.f}) + little_endian(0x3f80, 2) + little_endian(0xc040, 2) + little_endian(1, 2);

std::string refusal_of(const std::string& bytes) {
  const ScratchFolder folder;
  const std::string path = folder.write("f", bytes);
  return refusal(folder.path(), [&] { SafetensorsFile file(path); });
}

std::string refusal_of(const std::string& json, const std::string& content) {
  return refusal_of(safetensors_bytes(json, content));
}

// The message for a header with the single tensor x over `content`.
std::string refusal_of_x(const std::string& entry, const std::string& content = "12345678") {
  return refusal_of(R"({"x":)" + entry + "}", content);
}

std::vector<float> widened(DType type, const void* from, std::size_t n) {
  std::vector<float> out(n);
  widen(out, type, from);
  return out;
}

}  // namespace

TEST_CASE("a file is read", "[safetensors]") {
  const ScratchFolder folder;
  const SafetensorsFile file(folder.write("f", safetensors_bytes(header, data)));
  REQUIRE(file.tensors().size() == 3);
  const SafeTensor& a = file.tensors().at("a");
  CHECK(a.dtype == "BF16");
  CHECK(a.shape == Shape{3});
  CHECK(widened(DType::bf16, a.bytes.data(), 3) == std::vector<float>{1.f, -3.f, 0x1p-133f});
  const SafeTensor& b = file.tensors().at("b");
  CHECK(b.shape == Shape{2, 1});
  CHECK(widened(DType::f32, b.bytes.data(), 2) == std::vector<float>{1.5f, -2.f});
  CHECK(file.tensors().at("none").bytes.empty());
}

TEST_CASE("a dtype that nobody knows is reported by whoever needs the tensor", "[safetensors]") {
  const ScratchFolder folder;
  const SafetensorsFile file(
      folder.write("f", safetensors_bytes(R"({"x":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}})", "12")));
  CHECK(file.tensors().at("x").dtype == "F4");
}

TEST_CASE("a truncated file says so", "[safetensors]") {
  const std::string whole = safetensors_bytes(header, data);
  CHECK(refusal_of("") == "f: has 0 bytes, too short for a safetensors file (truncated?)");
  CHECK(refusal_of(whole.substr(0, 7)) == "f: has 7 bytes, too short for a safetensors file (truncated?)");
  CHECK(refusal_of(whole.substr(0, 20)) ==
        "f: declares a header of " + std::to_string(header.size()) + " bytes but only 12 follow (truncated?)");
  CHECK(refusal_of(whole.substr(0, whole.size() - 1)) ==
        "f: tensor \"a\": data_offsets [8,14] reach beyond the 13 bytes of data in the file (truncated?)");
  for (std::size_t size = 0; size < whole.size(); ++size) CHECK(refusal_of(whole.substr(0, size)) != "no error");
  CHECK(refusal_of(little_endian(UINT64_MAX, 8) + "{}") ==
        "f: declares a header of 18446744073709551615 bytes, more than the allowed 100000000: not a safetensors file");
}

TEST_CASE("a header must be an object of tensors", "[safetensors]") {
  CHECK(refusal_of("{", "") ==
        "f: header: not valid JSON: line 1, column 2: syntax error while parsing object key - "
        "unexpected end of input; expected string literal");
  CHECK(refusal_of("[]", "") == "f: header: found [], expected an object");
  CHECK(refusal_of(R"({"x":1,"x":2})", "") == "f: header: key \"x\" appears twice in one object");
  CHECK(refusal_of(R"({"x":{"shape":[],"shape":[]}})", "") == "f: header: key \"shape\" appears twice in one object");
  CHECK(refusal_of(std::string(100000, '['), "") == "f: header: nested deeper than 64 levels");
  CHECK(refusal_of(R"({"__metadata__":{"format":1}})", "") ==
        "f: __metadata__: found {\"format\":1}, expected an object of strings");
  CHECK(refusal_of_x("3") == "f: tensor \"x\": found 3, expected an object");
  CHECK(refusal_of_x("{}") == "f: tensor \"x\": has no dtype");
  CHECK(refusal_of_x(R"({"dtype":7})") == "f: tensor \"x\": dtype: found 7, expected a string");
  CHECK(refusal_of_x(R"({"dtype":"F32"})") == "f: tensor \"x\": has no shape");
  CHECK(refusal_of_x(R"({"dtype":"F32","shape":2})") ==
        "f: tensor \"x\": shape: found 2, expected a list of at most 16 sizes");
  CHECK(refusal_of_x(R"({"dtype":"F32","shape":[-2]})") ==
        "f: tensor \"x\": shape: found -2, expected a non-negative integer");
  CHECK(refusal_of_x(R"({"dtype":"F32","shape":[2.5]})") ==
        "f: tensor \"x\": shape: found 2.5, expected a non-negative integer");
  CHECK(refusal_of_x(R"({"dtype":"F32","shape":[4294967296,4294967296]})") ==
        "f: tensor \"x\": shape [4294967296,4294967296] is too large");
  CHECK(refusal_of_x(R"({"dtype":"F32","shape":[2]})") == "f: tensor \"x\": has no data_offsets");
  CHECK(refusal_of_x(R"({"dtype":"F32","shape":[2],"data_offsets":[0]})") ==
        "f: tensor \"x\": data_offsets: found [0], expected [begin, end]");
}

TEST_CASE("offsets must fit shapes, the file and each other", "[safetensors]") {
  CHECK(refusal_of_x(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})") ==
        "f: tensor \"x\": data_offsets [8,0]: the end lies before the begin");
  CHECK(refusal_of_x(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})") ==
        "f: tensor \"x\": F32 [3] needs 4 bytes for each of 3 elements, but its data_offsets span 8 bytes");
  CHECK(refusal_of_x(R"({"dtype":"F32","shape":[4611686018427387906],"data_offsets":[0,8]})") ==
        "f: tensor \"x\": F32 [4611686018427387906] needs 4 bytes for each of 4611686018427387906 elements, but its "
        "data_offsets span 8 bytes");
  CHECK(refusal_of_x(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})") ==
        "f: 4 bytes of data before tensor \"x\" belong to no tensor");
  CHECK(refusal_of_x(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})") ==
        "f: 4 bytes at the end belong to no tensor");
  CHECK(
      refusal_of(
          R"({"x":{"dtype":"U8","shape":[5],"data_offsets":[0,5]},"y":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
          "12345678") == "f: tensor \"y\" begins at byte 4 of the data, inside the one before it (ends at 5)");
}

TEST_CASE("damaged files give an error or a readable file, never a crash", "[safetensors]") {
  const std::string whole = safetensors_bytes(header, data);
  const ScratchFolder folder;
  std::mt19937 random(7);
  int refused = 0;
  for (int round = 0; round < 4000; ++round) {
    const std::string path = folder.write("f", damaged(whole, random));
    try {
      const SafetensorsFile file(path);
      std::size_t bytes = 0;  // all of them can be read and belong to the file
      for (const auto& [_, tensor] : file.tensors()) bytes += std::string(tensor.bytes).size();
      CHECK(bytes < file.file_size());
    } catch (const Error& error) {
      ++refused;
      CHECK(error.code() == ExitCode::bad_input);
    }
  }
  CHECK(refused > 2000);
}

TEST_CASE("what is written is read again", "[safetensors]") {
  const ScratchFolder folder;
  const std::string path = folder.path("model.safetensors");
  const std::string first(6, 'x'), second(16, 'y');
  SafetensorsWriter writer(path, {{"one", DType::f16, {3}}, {"two \"quoted\"", DType::f32, {2, 2}}});
  CHECK(refusal(
            folder.path(), [&] { writer.commit(); }, ExitCode::internal) ==
        "model.safetensors: 22 bytes of data are missing");
  const std::string both = first + second;
  writer.write(std::as_bytes(std::span(both.data(), 10)));
  CHECK_FALSE(std::filesystem::exists(path));
  writer.write(std::as_bytes(std::span(both.data() + 10, 12)));
  CHECK(refusal(
            folder.path(), [&] { writer.write(std::as_bytes(std::span(both.data(), 1))); }, ExitCode::internal) ==
        "model.safetensors: 1 bytes more than the header declares");
  writer.commit();
  const SafetensorsFile file(path);
  CHECK(file.tensors().at("one").bytes == first);
  CHECK(file.tensors().at("two \"quoted\"").bytes == second);
  CHECK(file.tensors().at("two \"quoted\"").shape == Shape{2, 2});
  CHECK((file.file_size() - both.size()) % 8 == 0);
}

TEST_CASE("a file that is given up leaves nothing behind", "[safetensors]") {
  const ScratchFolder folder;
  { SafetensorsWriter writer(folder.path("m"), {{"x", DType::f32, {1}}}); }
  CHECK(std::filesystem::is_empty(folder.path()));
  CHECK(refusal(
            folder.path(), [&] { SafetensorsWriter(folder.path("no/m"), {}); }, ExitCode::internal) ==
        "no/m.partial: cannot create: No such file or directory");
}

TEST_CASE("widening and narrowing agree with the number types for every 16-bit pattern", "[safetensors]") {
  std::vector<std::uint16_t> patterns(65536 * 5 + 1);  // enough for several threads
  for (std::size_t i = 0; i < patterns.size(); ++i) patterns[i] = std::uint16_t(i);
  std::vector<char> shifted(patterns.size() * 2 + 1);  // not aligned
  std::memcpy(shifted.data() + 1, patterns.data(), patterns.size() * 2);
  const auto same = [](float a, float b) { return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b); };
  const auto check_type = [&](auto type, DType dtype) {
    using T = decltype(type);
    const std::vector<float> wide = widened(dtype, shifted.data() + 1, patterns.size());
    std::vector<T> back(wide.size());
    narrow(back.data(), dtype, wide);
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < wide.size(); ++i) {
      const float expected = float(std::bit_cast<T>(patterns[i]));
      wrong += !same(wide[i], expected) || back[i].bits != T(expected).bits;
    }
    CHECK(wrong == 0);
  };
  check_type(bf16{}, DType::bf16);
  check_type(f16{}, DType::f16);
  const std::vector<float> values = {1.f,     -0.f, std::numeric_limits<float>::infinity(), 1e-40f, 65519.9f,
                                     65520.f, 3e38f};
  std::vector<f16> halves(values.size());
  narrow(halves.data(), DType::f16, values);
  for (std::size_t i = 0; i < values.size(); ++i) CHECK(halves[i].bits == f16(values[i]).bits);
}
