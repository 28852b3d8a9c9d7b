// The CUDA backend on the virtual GPU, which runs streams and threads in another order for each seed.
#include "kernels/backends.h"
#include "test/support/backends.h"
#include "virtual_gpu/virtual_gpu.h"

namespace distill::test {
namespace {

Backend virtual_gpu_of(std::uint64_t seed) {
  return {"virtual GPU, order " + std::to_string(seed), [=] {
            virtual_gpu::Options options = virtual_gpu::options_from_environment();
            options.seed = seed;
            options.memory = std::size_t{256} << 20;
            virtual_gpu::restart(options);
            return make_cuda_device(0);
          }};
}

}  // namespace

std::vector<Backend> backends() { return {virtual_gpu_of(1), virtual_gpu_of(2)}; }

}  // namespace distill::test
