// What Hdf5Reader says of files that this program has not written.
#include "io/hdf5.h"

#include <hdf5.h>

#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <catch2/catch.hpp>
#include <cerrno>

#include "test/support/refusal.h"
#include "test/support/scratch_folder.h"

using namespace distill;
using namespace distill::test;

namespace {
bool has_locks = true;
}

// A file system without locks, as some network file systems are.
extern "C" int flock(int file, int operation) noexcept {
  if (has_locks) return int(syscall(SYS_flock, file, operation));
  errno = EOPNOTSUPP;
  return -1;
}

namespace {

// A file with one dataset of plain numbers.
void write_plain(const std::string& path, const char* name, int dimensions) {
  hdf5_version();  // the library wants to be set up before its first use
  const std::array<hsize_t, 3> shape{2, 2, 2};
  const hid_t file = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  const hid_t space = H5Screate_simple(dimensions, shape.data(), nullptr);
  const hid_t dataset = H5Dcreate2(file, name, H5T_IEEE_F32LE, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  REQUIRE(dataset >= 0);
  H5Dclose(dataset);
  H5Sclose(space);
  H5Fclose(file);
}

}  // namespace

TEST_CASE("a dataset of another program is no matrix of this one", "[hdf5]") {
  const ScratchFolder folder;
  const auto refused = [&](const std::string& name) {
    return refusal(folder.path(), [&] { Hdf5Reader(folder.path("file.h5")).describe(name); });
  };
  for (const int dimensions : {1, 2, 3}) {
    write_plain(folder.path("file.h5"), "x", dimensions);
    CHECK(refused("x") == "file.h5: x is not a matrix with the attributes format, whole_shape and first");
  }
  CHECK(refused("y") == "file.h5: has no y");
}

TEST_CASE("what is no HDF5 file is an input error", "[hdf5]") {
  const ScratchFolder folder;
  folder.write("file.h5", "not HDF5");
  CHECK(refusal(folder.path(), [&] { Hdf5Reader(folder.path("file.h5")); }).starts_with("file.h5: cannot "));
}

TEST_CASE("matrices are kept on file systems that know no locks", "[hdf5]") {
  const ScratchFolder folder;
  const std::string path = folder.path("file.h5");
  const StoredMatrix matrix{.name = "a/b", .rows = 2, .cols = 2, .whole_rows = 2, .whole_cols = 2};
  const std::array<float, 4> values{1, 2, 3, 4};
  std::array<float, 4> found{};
  has_locks = false;
  // What the library does by itself.
  CHECK(H5Fcreate(folder.path("locked.h5").c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT) < 0);
  const std::string problem = refusal(folder.path(), [&] {
    Hdf5Writer out(path);
    out.write(matrix, std::as_bytes(std::span(values)));
    out.close();
    Hdf5Reader(path).read(matrix, {0, 0, 2, 2}, reinterpret_cast<std::byte*>(found.data()), 2);
  });
  has_locks = true;
  CHECK(problem == "no error");
  CHECK(found == values);
}
