#include "io/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "core/error.h"
#include "io/strict_json.h"

namespace distill {

static_assert(std::endian::native == std::endian::little, "the format is little-endian and is read as it lies");

namespace {

using nlohmann::json;

constexpr std::size_t length_bytes = 8;
constexpr std::uint64_t longest_header = 100'000'000;  // bytes; the limit of the reference implementation
constexpr std::size_t most_dimensions = 16;
constexpr const char* metadata_key = "__metadata__";

// Bytes of an element, or nothing for a dtype that this program has not heard of.
std::optional<std::uint64_t> element_bytes(const std::string& dtype) {
  static const std::map<std::string, std::uint64_t> sizes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1},
      {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},     {"U32", 4},
      {"F32", 4},  {"I64", 8}, {"U64", 8}, {"F64", 8},     {"C64", 8}};
  const auto found = sizes.find(dtype);
  return found == sizes.end() ? std::nullopt : std::optional(found->second);
}

std::string_view name_in_file(DType type) {
  switch (type) {
    case DType::f32:
      return "F32";
    case DType::bf16:
      return "BF16";
    case DType::f16:
      return "F16";
    default:
      fail("safetensors: ", name_of(type), " is not written");
  }
}

// Header and data of a file whose declared length fits into it.
struct Parts {
  std::string_view header, data;
};

Parts split(std::string_view file, const std::string& path) {
  check_input(file.size() >= length_bytes, path, ": has ", file.size(),
              " bytes, too short for a safetensors file (truncated?)");
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), length_bytes);
  check_input(length <= longest_header, path, ": declares a header of ", length, " bytes, more than the allowed ",
              longest_header, ": not a safetensors file");
  check_input(length <= file.size() - length_bytes, path, ": declares a header of ", length, " bytes but only ",
              file.size() - length_bytes, " follow (truncated?)");
  return {file.substr(length_bytes, length), file.substr(length_bytes + length)};
}

std::uint64_t unsigned_value(const json& value, const std::string& where) {
  check_input(value.is_number_unsigned(), where, ": found ", shown(value), ", expected a non-negative integer");
  return value.get<std::uint64_t>();
}

const json& member(const json& tensor, const char* key, const std::string& where) {
  const auto found = tensor.find(key);
  check_input(found != tensor.end(), where, ": has no ", key);
  return *found;
}

// Elements of a shape; fails where the product leaves 63 bits.
std::uint64_t read_shape(const json& shape, SafeTensor& tensor, const std::string& where) {
  check_input(shape.is_array() && shape.size() <= most_dimensions, where, ": shape: found ", shown(shape),
              ", expected a list of at most ", most_dimensions, " sizes");
  constexpr auto most = std::uint64_t(std::numeric_limits<std::int64_t>::max());
  std::uint64_t elements = 1;
  bool empty = false;
  for (const json& size : shape) {
    const std::uint64_t n = unsigned_value(size, where + ": shape");
    check_input(n <= most && (n == 0 || elements <= most / n), where, ": shape ", shown(shape), " is too large");
    empty = empty || n == 0;
    elements *= n == 0 ? 1 : n;
    tensor.shape.push_back(std::int64_t(n));
  }
  return empty ? 0 : elements;
}

SafeTensor read_tensor(const json& entry, std::string_view data, const std::string& where) {
  check_input(entry.is_object(), where, ": found ", shown(entry), ", expected an object");
  SafeTensor tensor;
  const json& dtype = member(entry, "dtype", where);
  check_input(dtype.is_string(), where, ": dtype: found ", shown(dtype), ", expected a string");
  tensor.dtype = dtype.get<std::string>();
  const std::uint64_t elements = read_shape(member(entry, "shape", where), tensor, where);
  const json& offsets = member(entry, "data_offsets", where);
  check_input(offsets.is_array() && offsets.size() == 2, where, ": data_offsets: found ", shown(offsets),
              ", expected [begin, end]");
  const std::uint64_t begin = unsigned_value(offsets[0], where + ": data_offsets"),
                      end = unsigned_value(offsets[1], where + ": data_offsets");
  check_input(begin <= end, where, ": data_offsets ", shown(offsets), ": the end lies before the begin");
  check_input(end <= data.size(), where, ": data_offsets ", shown(offsets), " reach beyond the ", data.size(),
              " bytes of data in the file (truncated?)");
  if (const auto bytes = element_bytes(tensor.dtype))
    check_input((end - begin) % *bytes == 0 && (end - begin) / *bytes == elements, where, ": ", tensor.dtype, ' ',
                shape_text(tensor.shape), " needs ", *bytes, " bytes for each of ", elements,
                " elements, but its data_offsets span ", end - begin, " bytes");
  tensor.bytes = data.substr(begin, end - begin);
  return tensor;
}

void check_metadata(const json& metadata, const std::string& path) {
  const auto is_string = [](const json& value) { return value.is_string(); };
  check_input(metadata.is_object() && std::all_of(metadata.begin(), metadata.end(), is_string), path, ": ",
              metadata_key, ": found ", shown(metadata), ", expected an object of strings");
}

// The tensors' bytes, put side by side, are the data: no gap, no overlap, nothing left.
void check_layout(const std::map<std::string, SafeTensor, std::less<>>& tensors, std::string_view data,
                  const std::string& path) {
  std::vector<const std::pair<const std::string, SafeTensor>*> order;
  for (const auto& entry : tensors) order.push_back(&entry);
  const auto begin = [&](const SafeTensor& t) { return std::size_t(t.bytes.data() - data.data()); };
  std::sort(order.begin(), order.end(), [&](const auto* a, const auto* b) {
    return std::pair(begin(a->second), a->second.bytes.size()) < std::pair(begin(b->second), b->second.bytes.size());
  });
  std::size_t end = 0;
  for (const auto* entry : order) {
    const std::size_t at = begin(entry->second);
    check_input(at >= end, path, ": tensor ", shown(entry->first), " begins at byte ", at,
                " of the data, inside the one before it (ends at ", end, ")");
    check_input(at == end, path, ": ", at - end, " bytes of data before tensor ", shown(entry->first),
                " belong to no tensor");
    end = at + entry->second.bytes.size();
  }
  check_input(end == data.size(), path, ": ", data.size() - end, " bytes at the end belong to no tensor");
}

}  // namespace

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string out = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) out += text(i == 0 ? "" : ", ", shape[i]);
  return out + "]";
}

SafetensorsFile::SafetensorsFile(const std::string& path) : path_(path), file_(path) {
  const Parts parts = split(file_.bytes(), path);
  const json header = parse_strict_json(parts.header, path + ": header");
  check_input(header.is_object(), path, ": header: found ", shown(header), ", expected an object");
  for (const auto& [name, entry] : header.items()) {
    if (name == metadata_key)
      check_metadata(entry, path);
    else
      tensors_.emplace(name, read_tensor(entry, parts.data, text(path, ": tensor ", shown(name))));
  }
  check_layout(tensors_, parts.data, path);
}

SafetensorsWriter::SafetensorsWriter(const std::string& path, const std::vector<Entry>& entries) : file_(path) {
  json header = {{metadata_key, {{"format", "pt"}}}};
  for (const Entry& entry : entries) {
    std::uint64_t bytes = size_of(entry.dtype);
    for (const std::int64_t n : entry.shape) bytes *= std::uint64_t(n);
    check(!header.contains(entry.name), path, ": tensor ", entry.name, " is given twice");
    header[entry.name] = {
        {"dtype", name_in_file(entry.dtype)}, {"shape", entry.shape}, {"data_offsets", {missing_, missing_ + bytes}}};
    missing_ += bytes;
  }
  std::string out = header.dump();
  out.resize((out.size() + length_bytes - 1) / length_bytes * length_bytes, ' ');  // so that the data is aligned
  const std::uint64_t length = out.size();
  file_.write(std::as_bytes(std::span(&length, 1)));
  file_.write(std::as_bytes(std::span(out)));
}

void SafetensorsWriter::write(std::span<const std::byte> bytes) {
  check(bytes.size() <= missing_, file_.path(), ": ", bytes.size() - missing_, " bytes more than the header declares");
  file_.write(bytes);
  missing_ -= bytes.size();
}

void SafetensorsWriter::commit() {
  check(missing_ == 0, file_.path(), ": ", missing_, " bytes of data are missing");
  file_.commit();
}

}  // namespace distill
