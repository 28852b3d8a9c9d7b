// Calls of the CUDA runtime, checked, and owners of what they hand out. For the files of this folder that are built
// only with the toolkit.
#pragma once

#include <cuda_runtime_api.h>

#include <source_location>
#include <utility>

#include "core/error.h"

namespace distill::cuda_calls {

inline void check_call(cudaError_t result, const std::source_location& where = std::source_location::current()) {
  if (result != cudaSuccess) [[unlikely]]
    fail(cudaGetErrorName(result), " (", cudaGetErrorString(result), ") at ", where.file_name(), ":", where.line());
}

inline cudaStream_t new_stream() {
  cudaStream_t stream{};
  check_call(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return stream;
}
inline cudaEvent_t new_event() {
  cudaEvent_t event{};
  check_call(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}

class Event {
 public:
  explicit Event(cudaEvent_t event) : event_(event) {}
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  ~Event() {
    if (event_) cudaEventDestroy(event_);
  }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_;
};

}  // namespace distill::cuda_calls
