// Owners of what the CUDA libraries hand out by value: streams, events, descriptors.
#pragma once

#include <utility>

namespace distill::cuda {

template <class T, auto destroy>
class Handle {
 public:
  Handle() = default;
  explicit Handle(T handle) : handle_(handle) {}
  Handle(Handle&& other) noexcept : handle_(std::exchange(other.handle_, T{})) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  // A destructor cannot report; what failed before already did.
  ~Handle() {
    if (handle_) destroy(handle_);
  }
  T get() const { return handle_; }

 private:
  T handle_{};
};

}  // namespace distill::cuda
