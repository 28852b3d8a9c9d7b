// A file system in memory that only this process and its children see: small, full or read-only on demand.
#pragma once

#include <sched.h>
#include <sys/mount.h>

#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>

namespace distill::test {

class SmallDisk {
 public:
  // Over an empty folder. Needs root, and a machine that lets it mount: is_there() says whether.
  SmallDisk(std::string path, std::uint64_t bytes) : path_(std::move(path)) {
    is_there_ = unshare(CLONE_NEWNS) == 0 && mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
                mount("none", path_.c_str(), "tmpfs", 0, size(bytes).c_str()) == 0;
  }
  ~SmallDisk() {
    if (is_there_) umount2(path_.c_str(), MNT_DETACH);
  }
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;

  bool is_there() const { return is_there_; }
  std::uint64_t used() const {
    const std::filesystem::space_info info = std::filesystem::space(path_);
    return info.capacity - info.free;
  }
  void resize(std::uint64_t bytes) { change(0, bytes); }
  void make_read_only(std::uint64_t bytes) { change(MS_RDONLY, bytes); }

 private:
  static std::string size(std::uint64_t bytes) { return "size=" + std::to_string(bytes); }
  void change(unsigned long flags, std::uint64_t bytes) {
    if (mount("none", path_.c_str(), "tmpfs", MS_REMOUNT | flags, size(bytes).c_str()) != 0)
      throw std::runtime_error("cannot change " + path_);
  }

  std::string path_;
  bool is_there_ = false;
};

}  // namespace distill::test
