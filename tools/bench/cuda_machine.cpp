#include <cuda_runtime_api.h>

#include "kernels/gpus.h"
#include "parallel/cuda_calls.h"
#include "tools/bench/machine.h"

namespace distill::bench {

using cuda_calls::check_call;

namespace {

std::string version(int v) { return text("CUDA ", v / 1000, ".", v % 1000 / 10); }

int attribute(cudaDeviceAttr of, int gpu) {
  int value = 0;
  check_call(cudaDeviceGetAttribute(&value, of, gpu));
  return value;
}

std::string gpu_line(int number, const Gpu& gpu) {
  return text("gpu ", number, ": ", gpu.name, ", ", gpu.memory >> 20, " MiB, compute capability ",
              attribute(cudaDevAttrComputeCapabilityMajor, number), ".",
              attribute(cudaDevAttrComputeCapabilityMinor, number), ", ",
              attribute(cudaDevAttrMultiProcessorCount, number), " multiprocessors, ", gpu.bus_id, ", ",
              gpu.exclusive ? "one process at a time" : "any number of processes", " (compute mode ",
              attribute(cudaDevAttrComputeMode, number), ")\n");
}

void copy(Device& device, void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  check_call(cudaMemcpyAsync(to, from, bytes, kind, static_cast<cudaStream_t>(device.native_stream())));
}

}  // namespace

std::string machine_text() {
  const Gpus gpus = find_gpus();
  check_input(gpus.problem.empty(), gpus.problem);
  int driver = 0, runtime = 0;
  check_call(cudaDriverGetVersion(&driver));
  check_call(cudaRuntimeGetVersion(&runtime));
  std::string lines = text("driver: ", version(driver), ", runtime: ", version(runtime), "\n");
  const int count = int(gpus.visible.size());
  for (int i = 0; i < count; ++i) lines += gpu_line(i, gpus.visible[std::size_t(i)]);
  for (int from = 0; from < count; ++from)
    for (int to = 0; to < count; ++to) {
      if (from == to) continue;
      int can = 0;
      check_call(cudaDeviceCanAccessPeer(&can, from, to));
      lines += text("peer access ", from, " -> ", to, ": ", can ? "yes" : "no", "\n");
    }
  return lines;
}

Buffer pinned_memory(std::size_t bytes) {
  void* memory = nullptr;
  check_call(cudaHostAlloc(&memory, bytes, cudaHostAllocDefault));
  return Buffer(memory, [](void* p) { cudaFreeHost(p); });
}

void copy_within(Device& device, void* to, const void* from, std::size_t bytes) {
  copy(device, to, from, bytes, cudaMemcpyDeviceToDevice);
}
void copy_to_device(Device& device, void* to, const void* from, std::size_t bytes) {
  copy(device, to, from, bytes, cudaMemcpyHostToDevice);
}

}  // namespace distill::bench
