#include "test/support/gpus.h"
#include "virtual_gpu/virtual_gpu.h"

namespace distill::test {

void set_up_gpus(const GpuSetup& setup) {
  virtual_gpu::Options options = virtual_gpu::options_from_environment();
  options.memory = std::size_t{64} << 20;
  options.seed = setup.seed;
  options.peer_access = setup.peer_access;
  virtual_gpu::restart(options);
}

int gpu_scale() { return 1; }

std::uint64_t gpu_copies() {
  std::uint64_t count = 0;
  for (const char* name : {"cudaMemcpy", "cudaMemcpyAsync", "cudaMemcpy2D", "cudaMemcpy2DAsync"})
    count += virtual_gpu::calls(name);
  return count;
}

std::uint64_t gpu_launches() { return virtual_gpu::calls("cudaLaunchKernelExC"); }

void fail_next(const std::string& call, int error) { virtual_gpu::fail(call, 1, error); }

std::vector<std::string> take_gpu_reports() {
  std::vector<std::string> texts;
  for (const virtual_gpu::Report& report : virtual_gpu::take_reports())
    texts.push_back(report.kind + ": " + report.text);
  return texts;
}

}  // namespace distill::test
