// Adds the time of a scope to a counter, the device's pending work included.
#pragma once

#include <chrono>

#include "core/device.h"

namespace distill {

class Stopwatch {
 public:
  Stopwatch(Device& device, double& seconds)
      : device_(device), seconds_(seconds), start_(std::chrono::steady_clock::now()) {}
  ~Stopwatch() {
    device_.synchronize();
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  Stopwatch(const Stopwatch&) = delete;

 private:
  Device& device_;
  double& seconds_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace distill
