#include "kernels/cuda/cuda_device.h"

namespace distill {

using namespace cuda;

namespace {

// Selects the GPU before anything of it is made.
std::string select(int ordinal) {
  int count = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  check_input(found == cudaSuccess, "no GPU can be used: ", cudaGetErrorString(found));
  check_input(ordinal >= 0 && ordinal < count, "GPU ", ordinal, " of ", count, " asked for");
  cuda_check(cudaSetDevice(ordinal));
  return text("cuda:", ordinal);
}

std::string version(int v) { return text(v / 1000, ".", v % 1000 / 10); }

}  // namespace

std::unique_ptr<Device> make_cuda_device(int ordinal, const CudaOptions& options) {
  return std::make_unique<CudaDevice>(ordinal, options);
}

std::string cuda_backend_version() {
  int runtime = 0;
  cuda_check(cudaRuntimeGetVersion(&runtime));
  return text("cuda (", version(runtime), ", ", cublas_version(), ", ", cudnn_version(), ")");
}

CudaDevice::CudaDevice(int ordinal, const CudaOptions& options)
    : name_(select(ordinal)),
      stream_(make_stream()),
      all_done_(make_event()),
      scratch_(use_, name_),
      product_(use_, name_) {
  if (options.library_attention) library_attention_ = make_library_attention(use_, name_, stream(), options.warn);
}

// Nothing of ours may be in use when the members go.
CudaDevice::~CudaDevice() { static_cast<void>(cudaStreamSynchronize(stream())); }

void CudaDevice::upload(View to, const void* host) {
  check(to.contiguous(), "upload into a strided view");
  staging_.upload(to.mutable_data(), host, std::size_t(to.size()) * size_of(to.dtype), stream());
}

void CudaDevice::download(void* host, const ConstView& from) {
  check(from.contiguous(), "download of a strided view");
  staging_.download(host, from.data, std::size_t(from.size()) * size_of(from.dtype), stream());
}

// Through an event, because waiting for it sleeps.
void CudaDevice::synchronize() {
  cuda_check(cudaEventRecord(all_done_.get(), stream()));
  cuda_check(cudaEventSynchronize(all_done_.get()));
}

void CudaDevice::do_gemm(View c, const Factor& a, const Factor& b, Write write) {
  product_.run(c, a, b, write, stream());
}

}  // namespace distill
