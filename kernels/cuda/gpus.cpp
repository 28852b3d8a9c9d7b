#include "kernels/gpus.h"

#include <cuda_runtime_api.h>

#include <array>
#include <cstdlib>

#include "core/error.h"

namespace distill {

namespace {

std::string version(int v) { return text(v / 1000, ".", v % 1000 / 10); }

// The driver runs programs of its own major version, and older ones.
std::string driver_problem() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver is loaded";
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) return "the CUDA runtime does not say its version";
  if (driver / 1000 >= runtime / 1000) return {};
  return text("the NVIDIA driver is for CUDA ", version(driver), " and this program for CUDA ", version(runtime),
              ": install a newer driver");
}

Gpus none(const std::string& problem) {
  cudaGetLastError();  // it is dealt with
  return {{}, problem};
}

}  // namespace

bool is_built_with_cuda() { return true; }

Gpus find_gpus() {
  if (const std::string problem = driver_problem(); !problem.empty()) return none(problem);
  int count = 0;
  if (const cudaError_t result = cudaGetDeviceCount(&count); result != cudaSuccess && result != cudaErrorNoDevice)
    return none(text("the driver shows no GPU: ", cudaGetErrorString(result)));
  if (count == 0) {
    const char* limit = std::getenv("CUDA_VISIBLE_DEVICES");
    return none(limit ? text("no GPU is visible (CUDA_VISIBLE_DEVICES=", limit, ")") : "no GPU is visible");
  }
  Gpus found;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    std::array<char, 32> bus_id{};
    cudaError_t result = cudaGetDeviceProperties(&properties, i);
    if (result == cudaSuccess) result = cudaDeviceGetPCIBusId(bus_id.data(), int(bus_id.size()), i);
    if (result != cudaSuccess) return none(text("GPU ", i, " does not answer: ", cudaGetErrorString(result)));
    if (properties.major < 8)
      return none(text("GPU ", i, ", ", properties.name, ", has compute capability ", properties.major, ".",
                       properties.minor, ": expected at least 8.0; CUDA_VISIBLE_DEVICES can leave it out"));
    found.visible.push_back({properties.name, bus_id.data(), properties.totalGlobalMem});
  }
  return found;
}

}  // namespace distill
