#include "kernels/cpu/cpu_device.h"

#include <omp.h>
#include <sys/resource.h>

#include <cstdlib>
#include <cstring>

#include "core/out_of_memory.h"
#include "kernels/backends.h"

namespace distill {

std::unique_ptr<Device> make_cpu_device(int threads) { return std::make_unique<CpuDevice>(threads); }

CpuDevice::CpuDevice(int threads) : threads_(threads), product_(threads), attention_scratch_(std::size_t(threads) + 1) {
  check(threads > 0, "CPU device with ", threads, " threads");
  omp_set_dynamic(0);
  omp_set_num_threads(threads);
}

double CpuDevice::peak_memory() const {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return double(usage.ru_maxrss) * 1024;  // reported in KiB
}

Buffer CpuDevice::allocate(std::size_t bytes) {
  const std::size_t rounded = (bytes + 63) / 64 * 64 + 64;
  void* memory = std::aligned_alloc(64, rounded);
  if (!memory) throw OutOfMemory(text("out of memory: ", bytes, " bytes asked for"));
  return Buffer(memory, [](void* p) { std::free(p); });
}

void CpuDevice::upload(View to, const void* host) {
  check(to.contiguous(), "upload into a strided view");
  if (to.size() > 0) std::memcpy(to.mutable_data(), host, std::size_t(to.size()) * size_of(to.dtype));
}

void CpuDevice::download(void* host, const ConstView& from) {
  check(from.contiguous(), "download of a strided view");
  if (from.size() > 0) std::memcpy(host, from.data, std::size_t(from.size()) * size_of(from.dtype));
}

void CpuDevice::do_gemm(View c, const Factor& a, const Factor& b, Write write) { product_.run(c, a, b, write); }

}  // namespace distill
