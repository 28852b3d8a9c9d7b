#include "io/encoded_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string_view>
#include <vector>

#include "core/error.h"
#include "io/crc32c.h"
#include "io/durable_file.h"
#include "io/hash.h"
#include "io/hdf5.h"
#include "io/mapped_file.h"

namespace distill {

namespace {

namespace fs = std::filesystem;

// To be raised when the file's form changes, or what a record is encoded to.
constexpr int version = 1;

// The user block, before all that is HDF5: one line that says what follows, filled up with line breaks.
constexpr std::size_t block_bytes = 512;

std::string user_block(std::string_view content) {
  std::array<char, 16> crc{};
  std::snprintf(crc.data(), crc.size(), "%08x", crc32c(std::as_bytes(std::span(content.data(), content.size()))));
  std::string line = text("distill encoded data, version ", version, ", ", content.size(),
                          " bytes after this block of ", block_bytes, ", CRC-32C ", crc.data());
  line.resize(block_bytes, '\n');
  return line;
}

constexpr const char *tokens_name = "tokens", *lengths_name = "lengths", *prompt_lengths_name = "prompt_lengths";

StoredMatrix column(const char* name, std::size_t rows) {
  const auto n = std::int64_t(rows);
  return {.name = name, .dtype = DType::i32, .rows = n, .cols = 1, .whole_rows = n, .whole_cols = 1};
}

void write_column(Hdf5Writer& file, const char* name, std::span<const std::int32_t> values) {
  file.write(column(name, values.size()), std::as_bytes(values));
}

std::vector<std::int32_t> read_column(const Hdf5Reader& file, const char* name, const std::string& path) {
  const StoredMatrix matrix = file.describe(name);
  check_input(matrix.dtype == DType::i32 && matrix.cols == 1, path, ": ", name, " is no column of 32-bit integers");
  std::vector<std::int32_t> values(std::size_t(matrix.rows));
  file.read(matrix, {.rows = matrix.rows, .cols = 1}, reinterpret_cast<std::byte*>(values.data()), 1);
  return values;
}

void write_content(const std::string& path, const EncodedData& data) {
  std::vector<std::int32_t> lengths;
  for (std::int64_t i = 0; i < data.samples.size(); ++i) lengths.push_back(std::int32_t(data.samples[i].tokens.size()));
  Hdf5Writer file(path, block_bytes);
  file.put_number("version", version);
  file.put_number("samples", data.samples.size());
  file.put_number("bad", data.bad);
  file.put_number("truncated", data.truncated);
  file.put_number("left_out", data.left_out);
  write_column(file, tokens_name, data.samples.tokens());
  write_column(file, lengths_name, lengths);
  write_column(file, prompt_lengths_name, data.samples.prompt_lengths());
  file.close();
}

void write_user_block(const std::string& path) {
  const std::string block = user_block(MappedFile(path).bytes().substr(block_bytes));
  const int descriptor = open(path.c_str(), O_WRONLY | O_CLOEXEC);
  const bool is_written = descriptor >= 0 && pwrite(descriptor, block.data(), block.size(), 0) == ssize_t(block.size());
  const int error = errno;
  if (descriptor >= 0) close(descriptor);
  check(is_written, path, ": cannot write: ", std::strerror(error));
  sync_path(path);
}

// What HDF5 must not see: it is not made for damaged files.
void check_user_block(const std::string& path) {
  const MappedFile file(path);
  check_input(file.bytes().size() > block_bytes, path, ": has only ", file.bytes().size(), " bytes");
  const std::string_view found = file.bytes().substr(0, block_bytes);
  const std::string wanted = user_block(file.bytes().substr(block_bytes));
  const auto first_line = [](std::string_view block) { return block.substr(0, block.find('\n')); };
  check_input(found == wanted, path, ": is damaged, or of another version: it begins \"",
              first_line(found).substr(0, 100), "\", expected \"", first_line(wanted), '"');
}

struct Arrays {
  std::vector<std::int32_t> tokens;
  std::vector<std::int64_t> offsets{0};
  std::vector<std::int32_t> prompt_lengths;
};

Samples checked(Arrays arrays, const std::vector<std::int32_t>& lengths, std::int64_t vocabulary,
                const std::string& path) {
  check_input(arrays.prompt_lengths.size() == lengths.size(), path, ": has ", lengths.size(), " lengths and ",
              arrays.prompt_lengths.size(), " prompt lengths");
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    check_input(lengths[i] >= 0 && arrays.prompt_lengths[i] >= 0 && arrays.prompt_lengths[i] <= lengths[i], path,
                ": sample ", i, " has ", lengths[i], " tokens, ", arrays.prompt_lengths[i], " of them prompt");
    arrays.offsets.push_back(arrays.offsets.back() + lengths[i]);
  }
  check_input(arrays.offsets.back() == std::int64_t(arrays.tokens.size()), path, ": has ", arrays.tokens.size(),
              " tokens, its lengths say ", arrays.offsets.back());
  for (const std::int32_t token : arrays.tokens)
    check_input(token >= 0 && token < vocabulary, path, ": token ", token, ": expected 0 to ", vocabulary - 1);
  const auto owner = std::make_shared<const Arrays>(std::move(arrays));
  return {owner->tokens, owner->offsets, owner->prompt_lengths, owner};
}

}  // namespace

std::string encoding_key(std::span<const std::string> words, std::span<const std::string> files) {
  Hasher hasher;
  hasher.add(text("version ", version));
  for (const std::string& word : words) hasher.add(word);
  for (const std::string& file : files) {
    hasher.add(file);
    hasher.add(MappedFile(file).bytes());
  }
  return hasher.hex();
}

std::uint64_t write_encoded(const std::string& path, const EncodedData& data) {
  const std::string partial = path + ".partial";
  try {
    write_content(partial, data);
    write_user_block(partial);
    const std::uint64_t bytes = fs::file_size(partial);
    fs::rename(partial, path);
    sync_path(fs::path(path).parent_path());
    return bytes;
  } catch (...) {
    unlink(partial.c_str());
    throw;
  }
}

EncodedData read_encoded(const std::string& path, std::int64_t vocabulary) {
  check_user_block(path);
  const Hdf5Reader file(path);
  check_input(file.number("version") == version, path, ": is of version ", file.number("version"), ", expected ",
              version);
  Arrays arrays{.tokens = read_column(file, tokens_name, path),
                .prompt_lengths = read_column(file, prompt_lengths_name, path)};
  const std::vector<std::int32_t> lengths = read_column(file, lengths_name, path);
  check_input(file.number("samples") == std::int64_t(lengths.size()), path, ": has ", lengths.size(),
              " samples, expected ", file.number("samples"));
  return {.samples = checked(std::move(arrays), lengths, vocabulary, path),
          .bad = file.number("bad"),
          .truncated = file.number("truncated"),
          .left_out = file.number("left_out")};
}

}  // namespace distill
