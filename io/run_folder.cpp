#include "io/run_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "core/error.h"
#include "io/durable_file.h"

namespace distill {

namespace {

namespace fs = std::filesystem;

// "process 4711 on node-a"
std::string this_process() {
  std::array<char, 256> host{};
  gethostname(host.data(), host.size() - 1);
  return text("process ", getpid(), " on ", host.data());
}

std::string content(int descriptor) {
  std::array<char, 300> out{};
  const ssize_t n = pread(descriptor, out.data(), out.size(), 0);
  return n > 0 ? std::string(out.data(), std::size_t(n)) : "another process";
}

}  // namespace

FolderLock::FolderLock(const std::string& path, const Warn& warn) : path_(path) {
  std::error_code error;
  fs::create_directories(path, error);
  check_input(!error, path, ": cannot create: ", error.message());
  const std::string file = path + "/.lock";
  descriptor_ = open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  check_input(descriptor_ >= 0, file, ": cannot open: ", std::strerror(errno));
  if (flock(descriptor_, LOCK_EX | LOCK_NB) != 0) {
    const int reason = errno;
    if (reason == EWOULDBLOCK) {
      const std::string holder = content(descriptor_);
      close(descriptor_);
      fail_input(path, ": is in use by ", holder, "; wait for that run, stop it, or choose another exp_name");
    }
    warn(text(path, ": cannot be locked (", std::strerror(reason),
              "): nothing keeps a second run from writing into it"));
  }
  // Only for messages, so a full disk must not stop a run here.
  const std::string mine = this_process();
  if (ftruncate(descriptor_, 0) != 0 || pwrite(descriptor_, mine.data(), mine.size(), 0) < 0) return;
}

FolderLock::~FolderLock() { close(descriptor_); }

RunFolder::RunFolder(const std::string& path, const std::vector<std::string>& others, const FolderLock::Warn& warn) {
  locks_.emplace_back(path, warn);
  for (const std::string& other : others) {
    std::error_code missing;
    const auto is_other = [&](const FolderLock& held) { return fs::equivalent(held.path(), other, missing); };
    if (std::none_of(locks_.begin(), locks_.end(), is_other)) locks_.emplace_back(other, warn);
  }
}

void RunFolder::mark_finished(std::int64_t step) const { write_durably(file("finished"), text("step ", step, '\n')); }

void RunFolder::clear_finished() const {
  std::error_code ignored;
  fs::remove(file("finished"), ignored);
}

}  // namespace distill
