// A virtual GPU for one test, and what tests ask of it.
#pragma once

#include <cuda_runtime_api.h>

#include <catch2/catch.hpp>
#include <string>
#include <vector>

#include "virtual_gpu/virtual_gpu.h"

namespace virtual_gpu {

// Starts over, and at the end of the test nothing may be left alive or unreported.
class Fresh {
 public:
  explicit Fresh(const Options& options = {}) {
    take_reports();
    restart(options);
    take_reports();
  }
  ~Fresh() {
    report_leaks();
    for (const Report& r : take_reports()) {
      UNSCOPED_INFO(r.kind + ": " + r.text);
      CHECK(r.kind.empty());
    }
    restart({});
    take_reports();
  }
  Fresh(const Fresh&) = delete;
  Fresh& operator=(const Fresh&) = delete;
};

// All reports since the last time, which must be of this kind; their texts.
inline std::string taken(const std::string& kind) {
  std::string texts;
  for (const Report& r : take_reports()) {
    CHECK(r.kind == kind);
    texts += r.text + "\n";
  }
  return texts;
}

// Device memory of n numbers.
template <class T>
T* on_device(const std::vector<T>& values) {
  void* memory = nullptr;
  REQUIRE(cudaMalloc(&memory, values.size() * sizeof(T)) == cudaSuccess);
  REQUIRE(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
  return static_cast<T*>(memory);
}
template <class T>
std::vector<T> from_device(const T* memory, std::size_t n) {
  std::vector<T> values(n);
  REQUIRE(cudaMemcpy(values.data(), memory, n * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
  return values;
}

}  // namespace virtual_gpu
