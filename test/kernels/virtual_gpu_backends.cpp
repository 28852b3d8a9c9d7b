// The CUDA backend on the virtual GPU, which runs streams and threads in another order for each seed.
#include "kernels/backends.h"
#include "test/support/backends.h"
#include "virtual_gpu/virtual_gpu.h"

namespace distill::test {
namespace {

// One device for all cases of a seed, which come one after the other: a new one takes longer than most of them.
struct Current {
  std::uint64_t seed = 0;
  std::shared_ptr<Device> device;
  // Started before there is a device, the virtual GPU looks for what is left after the device went.
  Current() { virtual_gpu::restart(virtual_gpu::options_from_environment()); }
};

Backend virtual_gpu_of(std::uint64_t seed) {
  return {"virtual GPU, order " + std::to_string(seed), [=] {
            static Current current;
            if (seed != current.seed) {
              current.device.reset();
              virtual_gpu::Options options = virtual_gpu::options_from_environment();
              options.seed = current.seed = seed;
              if (seed > 1) options.races = virtual_gpu::Races::off;  // accesses are the same in any order
              virtual_gpu::restart(options);
              current.device = make_cuda_device(0);
            }
            return current.device;
          }};
}

}  // namespace

std::vector<Backend> backends() { return {virtual_gpu_of(1), virtual_gpu_of(2)}; }

}  // namespace distill::test
