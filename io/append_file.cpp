#include "io/append_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "core/error.h"
#include "io/durable_file.h"

namespace distill {

AppendFile::AppendFile(const std::string& path, Warn warn) : path_(path), warn_(std::move(warn)) {
  descriptor_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  check_input(descriptor_ >= 0, path, ": cannot open: ", std::strerror(errno));
  end_ = lseek(descriptor_, 0, SEEK_END);
  if (end_ == 0) sync_path(std::filesystem::absolute(path).parent_path());  // the name of a new file
}

AppendFile::~AppendFile() { close(descriptor_); }

void AppendFile::cut(std::int64_t size) {
  const bool is_cut = ftruncate(descriptor_, size) == 0;
  check_input(is_cut, path_, ": cannot cut: ", std::strerror(errno));
  end_ = size;
}

void AppendFile::append(std::string_view piece) {
  std::size_t done = 0;
  ssize_t n = 0;
  while (done < piece.size() &&
         (n = pwrite(descriptor_, piece.data() + done, piece.size() - done, end_ + off_t(done))) > 0)
    done += std::size_t(n);
  if (done == piece.size()) {
    end_ += std::int64_t(done);
    return;
  }
  const int reason = errno;
  const bool is_cut = ftruncate(descriptor_, end_) == 0;
  if (!warned_ || !is_cut)
    warn_(text(path_, ": cannot write: ", std::strerror(reason), "; metrics are missing from here on"));
  warned_ = true;
}

void AppendFile::sync() {
  if (fdatasync(descriptor_) == 0 || sync_warned_) return;
  warn_(text(path_, ": cannot flush to the disk: ", std::strerror(errno)));
  sync_warned_ = true;
}

}  // namespace distill
