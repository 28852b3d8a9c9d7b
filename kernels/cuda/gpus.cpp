#include "kernels/gpus.h"

#include <cuda_runtime_api.h>

#include <array>
#include <cstdlib>

#include "core/error.h"

namespace distill {

namespace {

std::string version(int v) { return text(v / 1000, ".", v % 1000 / 10); }

struct Versions {
  int driver = 0, runtime = 0;  // 12040 is 12.4
};

std::string driver_is_for(const Versions& v) {
  return text("the NVIDIA driver is for CUDA ", version(v.driver), " and this program for CUDA ", version(v.runtime));
}

// The driver runs programs of its own major version, and older ones.
std::string driver_problem(Versions& v) {
  if (cudaDriverGetVersion(&v.driver) != cudaSuccess || v.driver == 0) return "no NVIDIA driver is loaded";
  if (cudaRuntimeGetVersion(&v.runtime) != cudaSuccess) return "the CUDA runtime does not say its version";
  if (v.driver / 1000 >= v.runtime / 1000) return {};
  return driver_is_for(v) + ": install a newer driver";
}

// Where MPS runs it is MPS that is the one process, and all others are its clients.
bool takes_one_process(int mode, int gpu) {
  if (mode != cudaComputeModeExclusiveProcess && mode != cudaComputeModeExclusive) return false;
  int by_mps = 0;
  if (cudaDeviceGetAttribute(&by_mps, cudaDevAttrMpsEnabled, gpu) != cudaSuccess) cudaGetLastError();  // too old for it
  return !by_mps;
}

// GPU i, or why it cannot be used.
std::string look_at(int i, const Versions& versions, Gpu& gpu) {
  cudaDeviceProp properties{};
  std::array<char, 32> bus_id{};
  int mode = cudaComputeModeDefault;
  cudaError_t result = cudaGetDeviceProperties(&properties, i);
  if (result == cudaSuccess) result = cudaDeviceGetPCIBusId(bus_id.data(), int(bus_id.size()), i);
  if (result == cudaSuccess) result = cudaDeviceGetAttribute(&mode, cudaDevAttrComputeMode, i);
  if (result != cudaSuccess) return text("GPU ", i, " does not answer: ", cudaGetErrorString(result));
  const std::string capability = text(properties.major, ".", properties.minor);
  const std::string name = text("GPU ", i, ", ", properties.name);
  const std::string leave_out = "; CUDA_VISIBLE_DEVICES can leave it out";
  if (properties.major < 8)
    return text(name, ", has compute capability ", capability, ": expected at least 8.0", leave_out);
  // From PTX the driver makes machine code itself, and only from that of its own version and older ones.
  if (properties.major > DISTILL_MACHINE_CODE_UP_TO && versions.driver < versions.runtime)
    return text(driver_is_for(versions), ", which has no machine code for ", name, ", of compute capability ",
                capability, ": install a newer driver, or build with -DCMAKE_CUDA_ARCHITECTURES=", properties.major,
                properties.minor);
  if (mode == cudaComputeModeProhibited)
    return text(name, ", takes no process: its compute mode is Prohibited; nvidia-smi -c DEFAULT changes that",
                leave_out);
  gpu = {properties.name, bus_id.data(), properties.totalGlobalMem, takes_one_process(mode, i)};
  return {};
}

Gpus none(const std::string& problem) {
  cudaGetLastError();  // it is dealt with
  return {{}, problem};
}

}  // namespace

bool is_built_with_cuda() { return true; }

Gpus find_gpus() {
  Versions versions;
  if (const std::string problem = driver_problem(versions); !problem.empty()) return none(problem);
  int count = 0;
  if (const cudaError_t result = cudaGetDeviceCount(&count); result != cudaSuccess && result != cudaErrorNoDevice)
    return none(text("the driver shows no GPU: ", cudaGetErrorString(result)));
  if (count == 0) {
    const char* limit = std::getenv("CUDA_VISIBLE_DEVICES");
    return none(limit ? text("no GPU is visible (CUDA_VISIBLE_DEVICES=", limit, ")") : "no GPU is visible");
  }
  Gpus found;
  for (int i = 0; i < count; ++i) {
    Gpu gpu;
    if (const std::string problem = look_at(i, versions, gpu); !problem.empty()) return none(problem);
    found.visible.push_back(gpu);
  }
  return found;
}

}  // namespace distill
