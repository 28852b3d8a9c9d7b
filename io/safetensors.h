// The safetensors format: 8 bytes with the length of a JSON header, the header (name → dtype, shape, byte range), the
// data. Reading maps the file and checks everything before anything is used; writing streams.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/number.h"
#include "io/durable_file.h"
#include "io/mapped_file.h"

namespace distill {

struct SafeTensor {
  std::string dtype;  // as written in the file: F32, BF16, F16, I64, …
  std::vector<std::int64_t> shape;
  std::string_view bytes;  // row-major, little-endian; not necessarily aligned
};

// "[2, 3]"
std::string shape_text(const std::vector<std::int64_t>& shape);

class SafetensorsFile {
 public:
  // A file that is truncated, damaged or hostile is an input error that names it and what is wrong.
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return path_; }
  const std::map<std::string, SafeTensor, std::less<>>& tensors() const { return tensors_; }
  std::size_t file_size() const { return file_.bytes().size(); }

 private:
  std::string path_;
  MappedFile file_;
  std::map<std::string, SafeTensor, std::less<>> tensors_;
};

// Writes tensors one after the other, in the order of the list. The file appears under its name only when it is
// complete and on the disk.
class SafetensorsWriter {
 public:
  struct Entry {
    std::string name;
    DType dtype = DType::f32;  // f32, bf16 or f16
    std::vector<std::int64_t> shape;
  };
  SafetensorsWriter(const std::string& path, const std::vector<Entry>& entries);

  // The next bytes of the data; any cut is fine.
  void write(std::span<const std::byte> bytes);
  void commit();

 private:
  DurableFile file_;
  std::uint64_t missing_ = 0;  // bytes of data still to come
};

}  // namespace distill
