#include "io/hdf5.h"

#include <fcntl.h>
#include <hdf5.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <optional>
#include <utility>

#include "core/error.h"
#include "io/durable_file.h"
#include "io/hdf5_library.h"

namespace distill {

namespace {

using hdf5::Id, hdf5::must, hdf5::must_read, hdf5::take_turn;

constexpr std::int64_t slab_bytes = 8 << 20;
constexpr std::size_t most_at_once = 8 << 20;  // bytes of a write
constexpr const char *format_attribute = "format", *whole_attribute = "whole_shape", *first_attribute = "first";

hid_t stored_type(DType type) {
  switch (type) {
    case DType::f32:
      return H5T_IEEE_F32LE;
    case DType::f64:
      return H5T_IEEE_F64LE;
    case DType::bf16:
    case DType::f16:
      return H5T_STD_U16LE;
    case DType::i32:
      return H5T_STD_I32LE;
    default:
      fail("HDF5: ", name_of(type), " is not stored");
  }
}

std::optional<DType> type_by_name(std::string_view name) {
  for (const DType type : {DType::f32, DType::f64, DType::bf16, DType::f16, DType::i32})
    if (name == name_of(type)) return type;
  return std::nullopt;
}

// Cuts a part of a matrix into slabs. Those of a whole one lie in the file one after the other.
template <class Body>
void for_each_slab(DType type, const Slab& part, const Body& body) {
  const auto width = std::int64_t(size_of(type));
  const std::int64_t cols = std::clamp<std::int64_t>(slab_bytes / width, 1, std::max<std::int64_t>(part.cols, 1));
  const std::int64_t rows = cols < part.cols ? 1 : std::max<std::int64_t>(slab_bytes / (width * cols), 1);
  for (std::int64_t row = 0; row < part.rows; row += rows)
    for (std::int64_t col = 0; col < part.cols; col += cols)
      body(Slab{part.first_row + row, part.first_col + col, std::min(rows, part.rows - row),
                std::min(cols, part.cols - col)});
}

// Selects a slab of a file's dataspace and makes the one of the memory that goes with it, whose rows start `stride`
// elements apart.
hid_t select(hid_t space, const Slab& slab, std::int64_t stride) {
  const std::array<hsize_t, 2> first = {hsize_t(slab.first_row), hsize_t(slab.first_col)},
                               count = {hsize_t(slab.rows), hsize_t(slab.cols)},
                               memory_shape = {hsize_t(slab.rows), hsize_t(stride)}, begin = {0, 0};
  H5Sselect_hyperslab(space, H5S_SELECT_SET, first.data(), nullptr, count.data(), nullptr);
  const hid_t memory = H5Screate_simple(2, memory_shape.data(), nullptr);
  H5Sselect_hyperslab(memory, H5S_SELECT_SET, begin.data(), nullptr, count.data(), nullptr);
  return memory;
}

bool put_text(hid_t object, const char* name, std::string_view value) {
  const Id type(H5Tcopy(H5T_C_S1), H5Tclose), space(H5Screate(H5S_SCALAR), H5Sclose);
  H5Tset_size(type, value.size());
  const Id attribute(H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose);
  return H5Awrite(attribute, type, value.data()) >= 0;
}

bool put_pair(hid_t object, const char* name, std::int64_t a, std::int64_t b) {
  const std::array<hsize_t, 1> size = {2};
  const std::array<std::int64_t, 2> values = {a, b};
  const Id space(H5Screate_simple(1, size.data(), nullptr), H5Sclose);
  const Id attribute(H5Acreate2(object, name, H5T_STD_I64LE, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose);
  return H5Awrite(attribute, H5T_NATIVE_INT64, values.data()) >= 0;
}

std::string get_text(hid_t object, const char* name) {
  const Id attribute(H5Aopen(object, name, H5P_DEFAULT), H5Aclose), type(H5Aget_type(attribute), H5Tclose);
  constexpr std::size_t most = 64;
  if (H5Tget_class(type) != H5T_STRING || H5Tis_variable_str(type) != 0 || H5Tget_size(type) > most) return "";
  std::string value(H5Tget_size(type), '\0');
  return H5Aread(attribute, type, value.data()) >= 0 ? value : "";
}

std::optional<std::pair<std::int64_t, std::int64_t>> get_pair(hid_t object, const char* name) {
  const Id attribute(H5Aopen(object, name, H5P_DEFAULT), H5Aclose), space(H5Aget_space(attribute), H5Sclose);
  std::array<std::int64_t, 2> values{};
  if (H5Sget_simple_extent_npoints(space) != 2 || H5Aread(attribute, H5T_NATIVE_INT64, values.data()) < 0)
    return std::nullopt;
  return std::pair(values[0], values[1]);
}

}  // namespace

Hdf5Writer::Hdf5Writer(const std::string& path, std::uint64_t user_block) : path_(path) {
  const auto turn = take_turn();
  const Id form(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  H5Pset_userblock(form, user_block);
  const Id access(hdf5::unlocked_access(), H5Pclose);
  file_ = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, form, access);
  must(file_ >= 0, path, "create");
  void* descriptor = nullptr;
  must(H5Fget_vfd_handle(file_, H5P_DEFAULT, &descriptor) >= 0, path, "write");
  descriptor_ = *static_cast<int*>(descriptor);
}

Hdf5Writer::~Hdf5Writer() {
  if (file_ < 0) return;
  const auto turn = take_turn();
  // The library writes before it closes; on a full disk it needs the space that the file itself holds.
  if (truncate(path_.c_str(), 0) == 0) H5Fclose(file_);
  unlink(path_.c_str());
}

// The place of the values is fixed at once, and nothing but write() ever touches it.
FileRange Hdf5Writer::make_dataset(const StoredMatrix& matrix) {
  const auto turn = take_turn();
  const std::array<hsize_t, 2> shape = {hsize_t(matrix.rows), hsize_t(matrix.cols)};
  const Id space(H5Screate_simple(2, shape.data(), nullptr), H5Sclose);
  const Id link(H5Pcreate(H5P_LINK_CREATE), H5Pclose), layout(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  H5Pset_create_intermediate_group(link, 1);
  H5Pset_layout(layout, H5D_CONTIGUOUS);
  H5Pset_alloc_time(layout, H5D_ALLOC_TIME_EARLY);
  H5Pset_fill_time(layout, H5D_FILL_TIME_NEVER);
  const Id dataset(H5Dcreate2(file_, matrix.name.c_str(), stored_type(matrix.dtype), space, link, layout, H5P_DEFAULT),
                   H5Dclose);
  must(dataset >= 0 && put_text(dataset, format_attribute, name_of(matrix.dtype)) &&
           put_pair(dataset, whole_attribute, matrix.whole_rows, matrix.whole_cols) &&
           put_pair(dataset, first_attribute, matrix.first_row, matrix.first_col),
       path_, "write " + matrix.name);
  const auto size = std::uint64_t(matrix.rows * matrix.cols) * size_of(matrix.dtype);
  return {size == 0 ? 0 : std::uint64_t(H5Dget_offset(dataset)), size};
}

FileRange Hdf5Writer::write(const StoredMatrix& matrix, std::span<const std::byte> values) {
  const FileRange range = make_dataset(matrix);
  check(values.size() == range.bytes, path_, ": ", values.size(), " bytes for ", matrix.name, ", which has ",
        range.bytes);
  std::uint64_t at = range.offset;
  while (!values.empty()) {
    const ssize_t n = pwrite(descriptor_, values.data(), std::min(values.size(), most_at_once), off_t(at));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(path_, ": cannot write ", matrix.name, ": ", std::strerror(errno));
    // The disk begins at once rather than when the file is flushed; a wish, so it cannot fail.
    sync_file_range(descriptor_, off_t(at), n, SYNC_FILE_RANGE_WRITE);
    values = values.subspan(std::size_t(n));
    at += std::uint64_t(n);
  }
  return range;
}

void Hdf5Writer::put_number(const char* name, std::int64_t value) {
  const auto turn = take_turn();
  const Id space(H5Screate(H5S_SCALAR), H5Sclose);
  const Id attribute(H5Acreate2(file_, name, H5T_STD_I64LE, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose);
  must(H5Awrite(attribute, H5T_NATIVE_INT64, &value) >= 0, path_, text("write ", name));
}

void Hdf5Writer::close() {
  {
    const auto turn = take_turn();
    must(H5Fflush(file_, H5F_SCOPE_GLOBAL) >= 0, path_, "write");
    must(H5Fclose(file_) >= 0, path_, "write");
    file_ = -1;
  }
  sync_path(path_);
}

Hdf5Reader::Hdf5Reader(const std::string& path) : path_(path) {
  const auto turn = take_turn();
  const Id access(hdf5::unlocked_access(), H5Pclose);
  file_ = H5Fopen(path.c_str(), H5F_ACC_RDONLY, access);
  must_read(file_ >= 0, path, "read");
}

Hdf5Reader::~Hdf5Reader() {
  const auto turn = take_turn();
  H5Fclose(file_);
}

StoredMatrix Hdf5Reader::describe(const std::string& name) const {
  const auto turn = take_turn();
  const Id dataset(H5Dopen2(file_, name.c_str(), H5P_DEFAULT), H5Dclose);
  check_input(dataset >= 0, path_, ": has no ", name);
  const Id space(H5Dget_space(dataset), H5Sclose);
  std::array<hsize_t, 2> shape{};
  const bool is_matrix =
      H5Sget_simple_extent_ndims(space) == 2 && H5Sget_simple_extent_dims(space, shape.data(), nullptr) == 2;
  const std::optional<DType> type = type_by_name(get_text(dataset, format_attribute));
  const auto whole = get_pair(dataset, whole_attribute), first = get_pair(dataset, first_attribute);
  check_input(is_matrix && type && whole && first, path_, ": ", name, " is not a matrix with the attributes ",
              format_attribute, ", ", whole_attribute, " and ", first_attribute);
  return {.name = name,
          .dtype = *type,
          .rows = std::int64_t(shape[0]),
          .cols = std::int64_t(shape[1]),
          .whole_rows = whole->first,
          .whole_cols = whole->second,
          .first_row = first->first,
          .first_col = first->second};
}

std::int64_t Hdf5Reader::number(const char* name) const {
  const auto turn = take_turn();
  const Id attribute(H5Aopen(file_, name, H5P_DEFAULT), H5Aclose), space(H5Aget_space(attribute), H5Sclose);
  std::int64_t value = 0;
  must_read(
      attribute >= 0 && H5Sget_simple_extent_npoints(space) == 1 && H5Aread(attribute, H5T_NATIVE_INT64, &value) >= 0,
      path_, text("read ", name));
  return value;
}

void Hdf5Reader::read(const StoredMatrix& matrix, const Slab& part, std::byte* to, std::int64_t stride) const {
  const auto width = std::int64_t(size_of(matrix.dtype));
  // A turn for each slab: others need not wait for the whole.
  for_each_slab(matrix.dtype, part, [&](const Slab& slab) {
    const auto turn = take_turn();
    const Id dataset(H5Dopen2(file_, matrix.name.c_str(), H5P_DEFAULT), H5Dclose);
    const Id space(H5Dget_space(dataset), H5Sclose), memory(select(space, slab, stride), H5Sclose);
    std::byte* first = to + ((slab.first_row - part.first_row) * stride + (slab.first_col - part.first_col)) * width;
    must_read(H5Dread(dataset, stored_type(matrix.dtype), memory, space, H5P_DEFAULT, first) >= 0, path_,
              "read " + matrix.name);
  });
}

std::string hdf5_version() {
  const auto turn = take_turn();
  unsigned major = 0, minor = 0, release = 0;
  H5get_libversion(&major, &minor, &release);
  return text(major, '.', minor, '.', release);
}

}  // namespace distill
