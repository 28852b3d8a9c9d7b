// The CUDA backend on the first GPU of this machine.
#include "kernels/backends.h"
#include "test/support/backends.h"

namespace distill::test {

std::vector<Backend> backends() {
  return {{"cuda", [] {
             static const std::shared_ptr<Device> device = make_cuda_device(0);
             return device;
           }}};
}

}  // namespace distill::test
