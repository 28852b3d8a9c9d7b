// Memory, errors and options of the CUDA backend, on the virtual GPU.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdint>
#include <vector>

#include "kernels/backends.h"
#include "kernels/cuda/sequence_packing.h"
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

TEST_CASE("a GPU with too little shared memory for a kernel", "[cuda]") {
  virtual_gpu::Options options = virtual_gpu::options_from_environment();
  options.shared_memory = 99 << 10;
  virtual_gpu::restart(options);
  const auto device = make_cuda_device(0);
  const std::vector<std::int32_t> begins{0, 1};
  Tensor offsets = device->tensor(1, 2, DType::i32);
  device->upload(offsets.view(), begins.data());
  const auto attend = [&](DType type) {
    Tensor x = device->tensor(1, 256, type), out = device->tensor(1, 256, type), log_sum = device->tensor(1, 1, type);
    device->zero(x.view());
    device->attention(out.view(), log_sum.view(), x.view(), x.view(), x.view(), {offsets.view(), 1},
                      {.q_heads = 1, .kv_heads = 1, .head_dim = 256, .scale = 1});
    device->synchronize();
  };
  CHECK_THAT(test::error_of([&] { attend(DType::f64); }).what(),
             Catch::Contains("attention_plain.cuh:") &&
                 Catch::Contains(" needs 139808 bytes of shared memory a block, this GPU gives 101376"));
  attend(DType::f32);
}

TEST_CASE("sequences as cuDNN takes them are those of a plain loop", "[cuda]") {
  const auto device = device_with(64 * mib);
  const std::vector<std::int32_t> begins =
      GENERATE(std::vector<std::int32_t>{0, 7}, std::vector<std::int32_t>{0, 3, 3, 300, 301});
  const auto count = std::int64_t(begins.size()) - 1;
  const std::int64_t sequences = count + GENERATE(0, 3, 200), wide = 1 << 28;  // offsets beyond 32 bits
  Tensor offsets = device->tensor(1, count + 1, DType::i32);
  device->upload(offsets.view(), begins.data());
  cuda::PackedSequences packed{.sequences = sequences, .operands = 3, .strides = {1, 96, wide}};
  Tensor lengths = device->tensor(1, sequences, DType::i32),
         places = device->tensor(1, 2 * 3 * (sequences + 1), DType::i32);  // two for each
  packed.lengths = static_cast<std::int32_t*>(lengths.view().mutable_data());
  packed.offsets = static_cast<std::int64_t*>(places.view().mutable_data());
  cuda::pack_sequences(packed, {offsets.view(), 0}, static_cast<cudaStream_t>(device->native_stream()));

  std::vector<std::int32_t> found_lengths(std::size_t(sequences), -1), expected_lengths;
  std::vector<std::int64_t> found(std::size_t(3 * (sequences + 1)), -1), expected;
  device->download(found_lengths.data(), lengths.view());
  device->download(found.data(), places.view());
  for (std::int64_t s = 0; s < sequences; ++s)
    expected_lengths.push_back(s < count ? begins[std::size_t(s) + 1] - begins[std::size_t(s)] : 0);
  for (const std::int64_t stride : {std::int64_t{1}, std::int64_t{96}, wide})
    for (std::int64_t s = 0; s <= sequences; ++s) expected.push_back(stride * begins[std::size_t(std::min(s, count))]);
  CHECK(found_lengths == expected_lengths);
  CHECK(found == expected);
}

TEST_CASE("without cuDNN its attention is one warning, and ours", "[cuda]") {
  CHECK(cuda_backend_version().find(", no cuDNN)") != std::string::npos);
  virtual_gpu::restart(virtual_gpu::options_from_environment());
  std::vector<std::string> warnings;
  const auto warn = [&](const std::string& message) { warnings.push_back(message); };
  const auto device = make_cuda_device(0, {.library_attention = true, .warn = warn});
  const std::vector<std::int32_t> begins{0, 1, 2};
  Tensor offsets = device->tensor(1, 3, DType::i32);
  device->upload(offsets.view(), begins.data());
  Tensor v = device->tensor(2, 64, DType::f32), out = device->tensor(2, 64, DType::f32),
         log_sum = device->tensor(2, 1, DType::f32);
  std::vector<float> sent(128), found(128);
  for (std::size_t i = 0; i < sent.size(); ++i) sent[i] = float(i);
  device->upload(v.view(), sent.data());
  for (int call = 0; call < 2; ++call)
    device->attention(out.view(), log_sum.view(), v.view(), v.view(), v.view(), {offsets.view(), 1},
                      {.q_heads = 1, .kv_heads = 1, .head_dim = 64, .scale = 1});
  device->download(found.data(), out.view());
  CHECK(found == sent);  // each sees only itself
  CHECK(warnings == std::vector<std::string>{"attn_implementation: sdpa: this program was built without cuDNN; our own "
                                             "attention is used"});
  warnings.clear();
  make_cuda_device(0, {.library_attention = false, .warn = warn});
  CHECK(warnings.empty());
}

}  // namespace
}  // namespace distill
