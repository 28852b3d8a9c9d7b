#include "io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/error.h"

namespace distill {

namespace {

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) close(fd);
  }
};

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  // O_NONBLOCK: a named pipe is reported, not waited for.
  const Descriptor file{open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  check_input(file.fd >= 0, path, ": cannot open: ", std::strerror(errno));
  struct stat info = {};
  const bool is_known = fstat(file.fd, &info) == 0;
  check_input(is_known, path, ": cannot read: ", std::strerror(errno));
  check_input(!S_ISDIR(info.st_mode), path, ": is a folder, expected a file");
  check_input(S_ISREG(info.st_mode), path, ": is not a regular file");
  size_ = std::size_t(info.st_size);
  if (size_ == 0) return;  // nothing can be mapped
  void* memory = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.fd, 0);
  check_input(memory != MAP_FAILED, path, ": cannot read: ", std::strerror(errno));
  data_ = static_cast<const char*>(memory);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<char*>(data_), size_);
}

}  // namespace distill
