#include "kernels/cuda/cuda_memory.h"

#include <algorithm>
#include <cstring>

#include "core/out_of_memory.h"

namespace distill::cuda {

Stream make_stream() {
  cudaStream_t stream{};
  cuda_check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return Stream(stream);
}

Event make_event() {
  cudaEvent_t event{};
  cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync));
  return Event(event);
}

void MemoryUse::add(std::size_t bytes) {
  const std::size_t now = now_ += bytes;
  std::size_t peak = peak_;
  while (now > peak && !peak_.compare_exchange_weak(peak, now)) {
  }
}

Buffer allocate(const std::shared_ptr<MemoryUse>& use, std::size_t bytes, const std::string& device) {
  void* memory = nullptr;
  const std::size_t size = std::max<std::size_t>(bytes, 1);
  const cudaError_t result = cudaMalloc(&memory, size);
  if (result == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // the next launch must not find it
    std::size_t available = 0, total = 0;
    cuda_check(cudaMemGetInfo(&available, &total));
    throw OutOfMemory(
        text(device, ": out of memory: ", bytes, " bytes asked for, ", available, " of ", total, " free"));
  }
  cuda_check(result);
  use->add(size);
  return Buffer(memory, [use, size](void* p) {
    cudaFree(p);  // waits for what still uses it
    use->remove(size);
  });
}

void* DeviceScratch::bytes(std::size_t count) {
  if (count > capacity_) {
    memory_.reset();
    capacity_ = 0;
    memory_ = allocate(use_, count, device_);
    capacity_ = count;
  }
  return memory_.get();
}

Staging::Staging() {
  void* memory = nullptr;
  cuda_check(cudaHostAlloc(&memory, part_bytes * parts, cudaHostAllocDefault));
  memory_.reset(static_cast<char*>(memory));
  for (Event& event : done_) event = make_event();
}

std::size_t Staging::next() {
  const std::size_t i = next_;
  next_ = (next_ + 1) % parts;
  cuda_check(cudaEventSynchronize(done_[i].get()));  // at once where nothing was recorded
  return i;
}

void Staging::upload(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  for (std::size_t at = 0; at < bytes; at += part_bytes) {
    const std::size_t n = std::min(part_bytes, bytes - at), i = next();
    std::memcpy(part(i), static_cast<const char*>(from) + at, n);
    cuda_check(cudaMemcpyAsync(static_cast<char*>(to) + at, part(i), n, cudaMemcpyHostToDevice, stream));
    cuda_check(cudaEventRecord(done_[i].get(), stream));
  }
}

void Staging::download(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  const std::size_t pieces = (bytes + part_bytes - 1) / part_bytes;
  std::array<std::size_t, parts> part_of{};
  const auto size_of_piece = [&](std::size_t p) { return std::min(part_bytes, bytes - p * part_bytes); };
  // Up to parts − 1 copies are on their way while the oldest is emptied.
  for (std::size_t begun = 0, emptied = 0; emptied < pieces;) {
    if (begun < pieces && begun - emptied < parts - 1) {
      const std::size_t i = part_of[begun % parts] = next();
      cuda_check(cudaMemcpyAsync(part(i), static_cast<const char*>(from) + begun * part_bytes, size_of_piece(begun),
                                 cudaMemcpyDeviceToHost, stream));
      cuda_check(cudaEventRecord(done_[i].get(), stream));
      ++begun;
      continue;
    }
    const std::size_t i = part_of[emptied % parts];
    cuda_check(cudaEventSynchronize(done_[i].get()));
    std::memcpy(static_cast<char*>(to) + emptied * part_bytes, part(i), size_of_piece(emptied));
    ++emptied;
  }
}

}  // namespace distill::cuda
