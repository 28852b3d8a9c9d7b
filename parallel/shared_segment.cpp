#include "parallel/shared_segment.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <random>
#include <string_view>
#include <utility>

#include "core/error.h"
#include "parallel/liveness.h"
#include "parallel/parallel.h"

namespace distill {

namespace {

constexpr std::string_view prefix = "distill-";

// A lock by which remove_leftovers() knows that the maker lives; the mapping of the file keeps it. False where the file
// was removed before it had one.
bool hold(const Descriptor& file) {
  struct stat info {};
  while (flock(file.get(), LOCK_SH) != 0)
    if (errno != EINTR) return true;  // no locks here, so nobody else gets one
  return fstat(file.get(), &info) != 0 || info.st_nlink > 0;
}

std::byte* map(int fd, std::size_t bytes, const std::string& name) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  check(memory != MAP_FAILED, "cannot map ", bytes, " bytes of shared memory ", name, ": ", std::strerror(errno));
  return static_cast<std::byte*>(memory);
}

}  // namespace

std::uint64_t shared_memory_available() {
  struct statvfs info {};
  if (statvfs("/dev/shm", &info) != 0 || info.f_blocks == 0) return UINT64_MAX;
  return std::uint64_t(info.f_bavail) * info.f_frsize;
}

SharedSegment SharedSegment::create(std::size_t bytes, const std::string& purpose) {
  SharedSegment segment;
  std::random_device random;
  Descriptor file;
  do {
    segment.name_ = text('/', prefix, getpid(), "-", random());
    file = Descriptor(shm_open(segment.name_.c_str(), O_CREAT | O_EXCL | O_RDWR, 0600));
  } while (file ? !hold(file) : errno == EEXIST);
  check_input(bool(file), purpose, ": cannot make shared memory in /dev/shm: ", std::strerror(errno));
  segment.is_linked_ = true;
  const std::uint64_t available = shared_memory_available();
  int error = bytes > available ? ENOSPC : EINTR;
  while (error == EINTR) error = posix_fallocate(file.get(), 0, off_t(bytes));
  check_input(error == 0, purpose, " needs ", bytes, " bytes of shared memory, /dev/shm has ", available,
              " available (df /dev/shm): ", std::strerror(error));
  segment.data_ = map(file.get(), bytes, segment.name_);
  segment.size_ = bytes;
  return segment;
}

SharedSegment SharedSegment::open(const std::string& name, std::size_t bytes) {
  const Descriptor file(shm_open(name.c_str(), O_RDWR, 0));
  check(bool(file), "cannot open shared memory ", name, " of another rank: ", std::strerror(errno),
        " (ranks of one node must share /dev/shm)");
  SharedSegment segment;
  segment.name_ = name;
  segment.data_ = map(file.get(), bytes, name);
  segment.size_ = bytes;
  return segment;
}

void SharedSegment::remove_leftovers() {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm", error)) {
    const std::string name = entry.path().filename();
    if (!name.starts_with(prefix)) continue;
    const Descriptor file(shm_open(text('/', name).c_str(), O_RDONLY, 0));
    struct stat info {};
    const bool is_ours = file && fstat(file.get(), &info) == 0 && S_ISREG(info.st_mode) && info.st_uid == geteuid();
    // Whoever has just made it and waits for its lock meanwhile sees that the name is gone, and makes another.
    if (is_ours && flock(file.get(), LOCK_EX | LOCK_NB) == 0) shm_unlink(text('/', name).c_str());
  }
}

SharedSegment::SharedSegment(SharedSegment&& other) noexcept { *this = std::move(other); }

SharedSegment& SharedSegment::operator=(SharedSegment&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(name_, other.name_);
  std::swap(is_linked_, other.is_linked_);
  return *this;
}

SharedSegment::~SharedSegment() {
  unlink();
  if (data_ != nullptr) munmap(data_, size_);
}

void SharedSegment::unlink() {
  if (is_linked_) shm_unlink(name_.c_str());
  is_linked_ = false;
}

}  // namespace distill
