// The backends. Concrete classes stay in their folders.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "core/device.h"

namespace distill {

// The host's processor with this many compute threads.
std::unique_ptr<Device> make_cpu_device(int threads);
struct CudaOptions {
  bool library_attention = false;                                            // cuDNN's attention where it can be used
  std::function<void(const std::string&)> warn = [](const std::string&) {};  // why it cannot be
};
// A GPU, counted among those that this process may see. An input error where there is no such GPU, or where this
// program was built without CUDA.
std::unique_ptr<Device> make_cuda_device(int ordinal, const CudaOptions& options = {});
// Libraries and their versions, for --version.
std::string cpu_backend_version();
std::string cuda_backend_version();

}  // namespace distill
