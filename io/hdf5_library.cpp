#include "io/hdf5_library.h"

#include <hdf5.h>

#include "core/error.h"

namespace distill::hdf5 {

// The first one to come also silences the library's handler at exit, which would wait for ever for a file that a full
// disk keeps it from closing, and the first one of each thread its error messages: builds that are made for threads
// keep a setting for each.
std::unique_lock<std::mutex> take_turn() {
  static std::mutex mutex;
  std::unique_lock lock(mutex);
  static const bool is_set_up = H5dont_atexit() >= 0;
  thread_local const bool is_silent = H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr) >= 0;
  check(is_set_up && is_silent, "HDF5 cannot be set up");
  return lock;
}

std::int64_t unlocked_access() {
  const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  H5Pset_file_locking(access, /*use_file_locking=*/0, /*ignore_when_disabled=*/1);
  return access;
}

std::string reason() {
  std::string out;
  const auto keep_first = [](unsigned n, const H5E_error2_t* error, void* to) -> herr_t {
    if (n == 0 && error->desc != nullptr) *static_cast<std::string*>(to) = error->desc;
    return 0;
  };
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, keep_first, &out);
  return out.empty() ? "HDF5 gives no reason" : out;
}

void must(bool went_well, const std::string& path, const std::string& what) {
  if (!went_well) fail(path, ": cannot ", what, ": ", reason());
}
void must_read(bool went_well, const std::string& path, const std::string& what) {
  if (!went_well) fail_input(path, ": cannot ", what, ": ", reason());
}

}  // namespace distill::hdf5
