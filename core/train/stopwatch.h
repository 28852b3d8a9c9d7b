// Adds the time of a scope to a counter, the device's pending work included.
#pragma once

#include <chrono>
#include <exception>

#include "core/device.h"

namespace distill {

class Stopwatch {
 public:
  Stopwatch(Device& device, double& seconds)
      : device_(device),
        seconds_(seconds),
        exceptions_at_start_(std::uncaught_exceptions()),
        start_(std::chrono::steady_clock::now()) {}
  // The device says here what went wrong in its pending work; while an error passes nothing is asked of it any more.
  ~Stopwatch() noexcept(false) {
    if (std::uncaught_exceptions() > exceptions_at_start_) return;
    device_.synchronize();
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  Stopwatch(const Stopwatch&) = delete;

 private:
  Device& device_;
  double& seconds_;
  int exceptions_at_start_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace distill
