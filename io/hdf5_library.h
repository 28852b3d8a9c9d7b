// How the files over HDF5's C interface share the library: in turns, with its reasons for failures, and identifiers
// that are given back. The library's own header stays in .cpp files; its hid_t is std::int64_t, its herr_t int.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>

namespace distill::hdf5 {

// Most builds of the library are not made for threads: every use of it holds this lock.
std::unique_lock<std::mutex> take_turn();

// What the library says about its last failure, most specific first.
std::string reason();

// "<path>: cannot <what>: <why>" unless it went well; must_read makes it an input error.
void must(bool went_well, const std::string& path, const std::string& what);
void must_read(bool went_well, const std::string& path, const std::string& what);

// What files are opened with (a property list, to be closed): without the library's own locks, which some network file
// systems do not have. A run's folders are locked (run_folder.h), and finished files do not change.
std::int64_t unlocked_access();

// An identifier of the library, given back at the end. Made and used while the lock is held.
class Id {
 public:
  Id(std::int64_t id, int (*close)(std::int64_t)) : id_(id), close_(close) {}
  ~Id() {
    if (id_ >= 0) close_(id_);
  }
  Id(const Id&) = delete;
  Id& operator=(const Id&) = delete;
  operator std::int64_t() const { return id_; }

 private:
  std::int64_t id_;
  int (*close_)(std::int64_t);
};

}  // namespace distill::hdf5
