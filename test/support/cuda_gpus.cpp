// This machine's GPUs. A program that links this file ends with one message and code 2 where there is none, before any
// test begins.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "kernels/gpus.h"
#include "test/support/gpus.h"

namespace {

std::atomic<std::uint64_t> copies{0};

// Calls the runtime's own function of this name, in whose place the one below was linked.
template <class... Parameter, class... Argument>
cudaError_t counted(cudaError_t (*)(Parameter...), const char* name, Argument... argument) {
  ++copies;
  return reinterpret_cast<cudaError_t (*)(Parameter...)>(dlsym(RTLD_NEXT, name))(argument...);
}

[[maybe_unused]] const bool is_checked = [] {
  const std::string problem = distill::find_gpus().problem;
  if (problem.empty()) return true;
  std::fprintf(stderr, "this test needs a GPU: %s\n", problem.c_str());
  std::exit(2);
}();

}  // namespace

// What the program links instead of the runtime's, which is a shared library.
extern "C" {
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind kind) {
  return counted(cudaMemcpy, "cudaMemcpy", to, from, n, kind);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind kind, cudaStream_t stream) {
  return counted(cudaMemcpyAsync, "cudaMemcpyAsync", to, from, n, kind, stream);
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                         cudaMemcpyKind kind) {
  return counted(cudaMemcpy2D, "cudaMemcpy2D", to, to_pitch, from, from_pitch, width, height, kind);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  return counted(cudaMemcpy2DAsync, "cudaMemcpy2DAsync", to, to_pitch, from, from_pitch, width, height, kind, stream);
}
cudaError_t cudaMemcpyPeer(void* to, int to_device, const void* from, int from_device, size_t n) {
  return counted(cudaMemcpyPeer, "cudaMemcpyPeer", to, to_device, from, from_device, n);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int to_device, const void* from, int from_device, size_t n,
                                cudaStream_t stream) {
  return counted(cudaMemcpyPeerAsync, "cudaMemcpyPeerAsync", to, to_device, from, from_device, n, stream);
}
}

namespace distill::test {

void set_up_gpus(const GpuSetup&) {}

int gpu_scale() { return 2000; }

std::uint64_t gpu_copies() { return copies; }

std::uint64_t gpu_launches() { throw std::logic_error("launches of a real GPU are not counted"); }

void fail_next(const std::string& call, int) {
  throw std::logic_error("a call of a real GPU cannot be made to fail: " + call);
}

std::vector<std::string> take_gpu_reports() { return {}; }

}  // namespace distill::test
