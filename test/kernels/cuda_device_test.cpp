// Memory and errors of the CUDA backend, on the virtual GPU.
#include <cuda_runtime_api.h>

#include <catch2/catch.hpp>
#include <cstdint>
#include <vector>

#include "kernels/backends.h"
#include "test/support/backends.h"
#include "test/support/refusal.h"
#include "virtual_gpu/virtual_gpu.h"

namespace distill {
namespace {

std::unique_ptr<Device> device_with(std::size_t memory, int devices = 1) {
  virtual_gpu::Options options = virtual_gpu::options_from_environment();
  options.memory = memory;
  options.devices = devices;
  virtual_gpu::restart(options);
  return make_cuda_device(0);
}
constexpr std::size_t mib = 1 << 20;

bool begins_with(const std::string& message, const std::string& start) { return message.rfind(start, 0) == 0; }

TEST_CASE("what goes to the device comes back, in parts that take turns", "[cuda]") {
  const auto device = device_with(128 * mib);
  // Nothing, one element, just about a part, more than all parts.
  const std::int64_t n = GENERATE(0, 1, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 20 * (1 << 16) + 77);
  std::vector<std::int32_t> sent(std::size_t(n) + 1), found(sent.size(), -1);
  for (std::size_t i = 0; i < sent.size(); ++i) sent[i] = std::int32_t(i * 2654435761u);
  const Tensor x = device->tensor(1, n, DType::i32), y = device->tensor(1, n, DType::i32);
  device->upload(View(const_cast<void*>(x.view().data), 1, n, DType::i32), sent.data());
  device->upload(View(const_cast<void*>(y.view().data), 1, n, DType::i32), found.data());
  const std::int32_t beyond = found.back();
  device->download(found.data(), x.view());
  CHECK(found.back() == beyond);
  sent.back() = beyond;
  CHECK(found == sent);
}

TEST_CASE("the host may change what it uploaded", "[cuda]") {
  const auto device = device_with(64 * mib);
  std::vector<float> host(1000, 1.0f), found(1000);
  Tensor x = device->tensor(1, 1000, DType::f32);
  device->upload(x.view(), host.data());
  host.assign(1000, 2.0f);
  device->download(found.data(), x.view());
  CHECK(found == std::vector<float>(1000, 1.0f));
}

TEST_CASE("peak memory is what was in use at most", "[cuda]") {
  const auto device = device_with(128 * mib);
  const double before = device->peak_memory();
  { const Buffer a = device->allocate(20 * mib), b = device->allocate(10 * mib); }
  const Buffer c = device->allocate(5 * mib);
  CHECK(device->peak_memory() - before == 30 * mib);
}

TEST_CASE("memory that is not there: how much was asked for, how much there is", "[cuda]") {
  const auto device = device_with(64 * mib);
  const Error error = test::error_of([&] { device->allocate(100 * mib); });
  CHECK(error.code() == ExitCode::bad_input);
  CHECK(begins_with(error.what(), "cuda:0: out of memory: 104857600 bytes asked for, "));
  CHECK(std::string(error.what()).find(" of 67108864 free") != std::string::npos);
  // The failure is not found again by what comes next.
  Tensor x = device->tensor(1, 8, DType::f32);
  device->zero(x.view());
  device->synchronize();
}

TEST_CASE("a GPU that is not there", "[cuda]") {
  const auto device = device_with(64 * mib, 2);
  CHECK(test::refusal("", [] { make_cuda_device(2); }) == "GPU 2 of 2 asked for");
  CHECK(make_cuda_device(1)->name() == "cuda:1");
  virtual_gpu::fail("cudaGetDeviceCount", 1, cudaErrorNoDevice);
  CHECK(begins_with(test::refusal("", [] { make_cuda_device(0); }), "no GPU can be used: "));
}

TEST_CASE("a call that fails is named", "[cuda]") {
  const auto device = device_with(64 * mib);
  Tensor x = device->tensor(1, 8, DType::f32);
  const std::string call = GENERATE("cudaLaunchKernelExC", "cudaMemcpyAsync", "cudaEventRecord");
  virtual_gpu::fail(call, 1, cudaErrorInvalidValue);
  std::vector<float> host(8, 1.0f);
  const Error error = test::error_of([&] {
    device->zero(x.view());
    device->upload(x.view(), host.data());
  });
  CHECK(error.code() == ExitCode::internal);
  CHECK(begins_with(error.what(), "cudaErrorInvalidValue ("));
}

}  // namespace
}  // namespace distill
