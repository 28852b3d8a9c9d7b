// A lower limit of a resource of this process for as long as it lives: what the machine refuses, on demand.
#pragma once

#include <sys/resource.h>

#include <csignal>
#include <stdexcept>

namespace distill::test {

class Limit {
 public:
  Limit(__rlimit_resource_t resource, rlim_t most) : resource_(resource) {
    if (getrlimit(resource_, &before_) != 0) throw std::runtime_error("getrlimit failed");
    rlimit lower = before_;
    lower.rlim_cur = most;
    if (setrlimit(resource_, &lower) != 0) throw std::runtime_error("setrlimit failed");
  }
  ~Limit() { setrlimit(resource_, &before_); }
  Limit(const Limit&) = delete;
  Limit& operator=(const Limit&) = delete;

 private:
  __rlimit_resource_t resource_;
  rlimit before_{};
};

// The largest size of a file, in bytes: what a full disk does, as an error of write() and not as a signal.
class FileLimit : public Limit {
 public:
  explicit FileLimit(rlim_t bytes) : Limit(RLIMIT_FSIZE, bytes) { std::signal(SIGXFSZ, SIG_IGN); }
};

}  // namespace distill::test
