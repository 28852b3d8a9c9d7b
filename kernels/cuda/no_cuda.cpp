// Stands for the CUDA backend where the toolkit was not found.
#include "core/error.h"
#include "kernels/backends.h"

namespace distill {

std::unique_ptr<Device> make_cuda_device(int, const CudaOptions&) {
  fail_input("this program was built without CUDA: build it where the CUDA toolkit is installed");
}

std::string cuda_backend_version() { return "built without CUDA"; }

}  // namespace distill
