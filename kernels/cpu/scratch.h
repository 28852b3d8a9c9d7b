// Memory that an operation needs beyond its operands, kept between calls: it grows to the largest size asked for.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "core/error.h"

namespace distill {

class Scratch {
 public:
  // `count` elements, 64-byte aligned, uninitialised; valid until the next call.
  template <class T>
  T* get(std::int64_t count) {
    return static_cast<T*>(bytes(std::size_t(count) * sizeof(T)));
  }

  void* bytes(std::size_t count) {
    if (count > capacity_) {
      const std::size_t rounded = (count + 63) / 64 * 64;
      memory_.reset();
      memory_.reset(std::aligned_alloc(64, rounded));
      check(memory_ != nullptr, "out of memory: ", rounded, " bytes asked for");
      capacity_ = rounded;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  std::size_t capacity_ = 0;
};

// Cuts one scratch into arrays, each 64-byte aligned. Called twice with the same requests: first to measure (base
// null).
class Cutter {
 public:
  explicit Cutter(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(std::int64_t count) {
    char* taken = base_ ? base_ + used_ : nullptr;
    used_ += (std::size_t(count) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(taken);
  }
  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

}  // namespace distill
