#include "kernels/cuda/cuda_device.h"

#include <algorithm>
#include <chrono>
#include <thread>

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
  if (is_watched()) synchronize();  // what it would wait for otherwise, and with nobody asked
  staging_.download(host, from.data, std::size_t(from.size()) * size_of(from.dtype), stream());
}

// Through an event, because waiting for it sleeps.
void CudaDevice::synchronize() {
  cuda_check(cudaEventRecord(all_done_.get(), stream()));
  if (is_watched()) wait_watched();
  cuda_check(cudaEventSynchronize(all_done_.get()));
}

// Until all_done_. Time in which this process itself did not run (stopped, suspended) does not count.
void CudaDevice::wait_watched() {
  using namespace std::chrono;
  constexpr auto shortest_nap = 10us, longest_nap = 200us;
  steady_clock::duration waited{0}, next_look = 100ms;
  for (auto last = steady_clock::now();;) {
    const cudaError_t state = cudaEventQuery(all_done_.get());
    if (state != cudaErrorNotReady) return cuda_check(state);
    cudaGetLastError();  // it is no error
    std::this_thread::sleep_for(std::clamp<steady_clock::duration>(waited / 8, shortest_nap, longest_nap));
    const auto now = steady_clock::now();
    waited += std::min<steady_clock::duration>(now - last, 1s);
    last = now;
    if (waited < next_look) continue;
    ask_watches(duration_cast<milliseconds>(waited));
    next_look = waited + 100ms;
  }
}

void CudaDevice::do_gemm(View c, const Factor& a, const Factor& b, Write write) {
  product_.run(c, a, b, write, stream());
}

}  // namespace distill
