// Matrices in an HDF5 file, each one contiguous dataset.
// Calls from several threads are fine: they take turns with the library, but no turn waits for the values of a matrix
// to be written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "core/number.h"

namespace distill {

// A dataset [rows, cols] and its attributes: `format` (16-bit floats are stored as unsigned integers), and where it
// lies in the whole matrix (`whole_shape`, `first`).
struct StoredMatrix {
  std::string name;  // with slashes; groups are made where they are missing
  DType dtype = DType::f32;
  std::int64_t rows = 0, cols = 0;
  std::int64_t whole_rows = 0, whole_cols = 0;
  std::int64_t first_row = 0, first_col = 0;
  bool operator==(const StoredMatrix&) const = default;
};

// A part of a matrix.
struct Slab {
  std::int64_t first_row = 0, first_col = 0, rows = 0, cols = 0;
};

struct FileRange {
  std::uint64_t offset = 0, bytes = 0;
};

class Hdf5Writer {
 public:
  // Failures throw (exit code internal) with path and reason; a file that is not closed is removed.
  // user_block bytes at the beginning (0, 512 or a larger power of two) are left to the caller.
  explicit Hdf5Writer(const std::string& path, std::uint64_t user_block = 0);
  ~Hdf5Writer();
  Hdf5Writer(const Hdf5Writer&) = delete;
  Hdf5Writer& operator=(const Hdf5Writer&) = delete;

  // values: row-major. Returns where in the file they lie. The library makes the dataset; the values themselves go to
  // their place in the file without it.
  FileRange write(const StoredMatrix& matrix, std::span<const std::byte> values);
  // An attribute of the file.
  void put_number(const char* name, std::int64_t value);
  // To be called at the end; the values are on the disk when it returns.
  void close();

 private:
  FileRange make_dataset(const StoredMatrix& matrix);

  std::string path_;
  std::int64_t file_ = -1;
  int descriptor_ = -1;  // the library's own
};

class Hdf5Reader {
 public:
  // What is wrong with the file is an input error.
  explicit Hdf5Reader(const std::string& path);
  ~Hdf5Reader();
  Hdf5Reader(const Hdf5Reader&) = delete;
  Hdf5Reader& operator=(const Hdf5Reader&) = delete;

  StoredMatrix describe(const std::string& name) const;
  std::int64_t number(const char* name) const;  // an attribute of the file
  // A part of a dataset into memory in which rows start `stride` elements apart.
  void read(const StoredMatrix& matrix, const Slab& part, std::byte* to, std::int64_t stride) const;

 private:
  std::string path_;
  std::int64_t file_ = -1;
};

// "1.10.8"
std::string hdf5_version();

}  // namespace distill
