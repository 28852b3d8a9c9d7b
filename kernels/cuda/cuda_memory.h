// Memory of a GPU and the ways to and from it.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <memory>

#include "core/tensor.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/handle.h"

namespace distill::cuda {

using Stream = Handle<cudaStream_t, &cudaStreamDestroy>;
using Event = Handle<cudaEvent_t, &cudaEventDestroy>;
Stream make_stream();  // independent of the default stream
Event make_event();    // whoever waits for it sleeps

// Bytes in use and the most there ever were. Outlives its device as long as buffers do.
class MemoryUse {
 public:
  void add(std::size_t bytes);
  void remove(std::size_t bytes) { now_ -= bytes; }
  std::size_t peak() const { return peak_; }

 private:
  std::atomic<std::size_t> now_{0}, peak_{0};
};

// Throws with the device, the bytes asked for and those that are free.
Buffer allocate(const std::shared_ptr<MemoryUse>& use, std::size_t bytes, const std::string& device);

// Memory that operations need beyond their operands: grows to the largest size asked for. Work on one stream may take
// turns with it.
class DeviceScratch {
 public:
  DeviceScratch(std::shared_ptr<MemoryUse> use, std::string device)
      : use_(std::move(use)), device_(std::move(device)) {}
  void* bytes(std::size_t count);

 private:
  std::shared_ptr<MemoryUse> use_;
  std::string device_;
  Buffer memory_;
  std::size_t capacity_ = 0;
};

// Pinned memory between the host's and the device's, in parts that take turns: a copy into one runs while the host
// fills or empties another.
class Staging {
 public:
  Staging();
  // Returns when `from` may be reused; the copy is ordered on the stream.
  void upload(void* to, const void* from, std::size_t bytes, cudaStream_t stream);
  // Returns when the bytes are there.
  void download(void* to, const void* from, std::size_t bytes, cudaStream_t stream);

 private:
  static constexpr std::size_t part_bytes = 256 << 10, parts = 16;
  struct Free {
    void operator()(char* p) const { cudaFreeHost(p); }
  };
  // A part whose last copy is done.
  std::size_t next();
  char* part(std::size_t i) { return memory_.get() + i * part_bytes; }

  std::unique_ptr<char, Free> memory_;
  std::array<Event, parts> done_;
  std::size_t next_ = 0;
};

}  // namespace distill::cuda
