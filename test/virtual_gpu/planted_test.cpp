// Bugs planted on purpose: each is caught, and the same code without the bug passes.
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "kernels/cuda/language.h"
#include "support/process.h"
#include "virtual_gpu/fresh.h"

using namespace distill;
using namespace distill::cuda;
using distill::test::Process;
using virtual_gpu::Fresh;
using virtual_gpu::from_device;
using virtual_gpu::on_device;
using virtual_gpu::Options;
using virtual_gpu::taken;

namespace {

__global__ void add_one(float* x, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) x[i] += 1;
}

// y[i] = x[n − 1 − i] through shared memory. barrier: the correct kernel.
__global__ void reverse(float* y, const float* x, bool barrier) {
  SHARED_ARRAY(float, tile, 64);
  tile[threadIdx.x] = x[threadIdx.x];
  if (barrier) __syncthreads();
  y[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

// Two rounds over one tile: the second writes what others may still read.
__global__ void two_rounds(float* y, const float* x, bool barrier) {
  SHARED_ARRAY(float, tile, 64);
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    if (barrier && round == 1) __syncthreads();
    tile[threadIdx.x] = x[64 * round + static_cast<int>(threadIdx.x)];
    __syncthreads();
    sum += tile[(threadIdx.x + 33) % 64];
  }
  y[threadIdx.x] = sum;
}

// Within a warp only __syncwarp orders.
__global__ void exchange_in_warp(float* y, bool barrier) {
  SHARED_ARRAY(float, tile, 32);
  tile[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (barrier) __syncwarp();
  y[threadIdx.x] = tile[31 - threadIdx.x];
}

__global__ void count_blocks(float* total, bool atomic) {
  if (threadIdx.x != 0) return;
  if (atomic)
    atomicAdd(total, 1.0f);
  else
    *total += 1;
}

// The last block to finish adds up what all have left: correct, and must not be reported.
__global__ void last_block_adds(float* total, float* parts, unsigned* finished) {
  parts[blockIdx.x] = static_cast<float>(blockIdx.x + 1);
  __threadfence();
  if (atomicInc(finished, gridDim.x - 1) + 1 < gridDim.x) return;
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b];
  *total = sum;
}

// Four floats at a time, from x[first] on: 16 bytes must lie at a multiple of 16.
__global__ void copy_four(float* y, const float* x, int first) {
  *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(x + first);
}
__global__ void load_matrix(std::uint32_t* y, int first) {
  SHARED_ARRAY(std::uint16_t, tile, 8 * 8 * 2 + 8);
  for (int i = static_cast<int>(threadIdx.x); i < 8 * 8 * 2 + 8; i += 32) tile[i] = static_cast<std::uint16_t>(i);
  __syncthreads();
  std::uint32_t r[2];
  ldmatrix_x2(r, &tile[first + 8 * (threadIdx.x % 16)]);
  y[threadIdx.x] = r[0] + r[1];
}

__global__ void barrier_for_some(float* x) {
  if (threadIdx.x < 10) return;
  __syncthreads();
  x[threadIdx.x] = 1;
}
__global__ void barriers_apart() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void shuffle_without_some(int* x) {
  if (threadIdx.x % 32 < 4) return;
  x[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 8);
}
__global__ void shuffle_from_outside(int* x) {
  if (threadIdx.x < 16) x[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 20);
}
__global__ void never_waits(float4* x) {
  SHARED_ARRAY(float4, tile, 32);
  copy_async_16(&tile[threadIdx.x], &x[threadIdx.x]);
  copy_async_commit();
}
__global__ void copies_over_what_is_read(float* y, const float4* x, bool barrier) {
  SHARED_ARRAY(float4, tile, 64);
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[(threadIdx.x + 33) % 64].x;
  if (barrier) __syncthreads();
  copy_async_16(&tile[threadIdx.x], &x[threadIdx.x]);
  copy_async_commit();
  __syncthreads();  // too late: the copy may have arrived
  copy_async_wait<0>();
}
__global__ void beyond_shared(float* x) {
  SHARED_ARRAY(float, tile, 32);
  tile[threadIdx.x + 1] = 1;
  x[0] = tile[0];
}
// Half a KiB of its own, and what the launch gives.
__global__ void uses_both_kinds(float* x) {
  SHARED_ARRAY(float, tile, 128);
  float* const rest = dynamic_shared<float>();
  tile[0] = rest[0] = 1;
  x[0] = tile[0] + rest[0];
}

// What code without any instrumentation, such as a library's, would do.
__attribute__((no_sanitize("thread", "address"))) __global__ void quietly_beyond(char* x, int n) { x[n] = 1; }

std::string self() { return std::filesystem::read_symlink("/proc/self/exe"); }

// Runs one of the hidden tests below in a process of its own, which must fail; what it printed.
std::string planted(const std::string& name) {
  Process process({self(), name});
  const Process::Result result = process.wait();
  CHECK(result.code != 0);
  return result.output;
}

constexpr int several = 20;  // seeds

}  // namespace

// --- streams

TEST_CASE("planted: a missing event wait gives wrong values under some order of the streams") {
  const auto wrong = [](std::uint64_t seed, bool wait) {
    const Fresh gpu(Options{.seed = seed});
    cudaStream_t first, second;
    cudaEvent_t ready;
    cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&ready, cudaEventDisableTiming);
    float* x = on_device(std::vector<float>(100, 1.0f));
    cudaDeviceSynchronize();
    launch(add_one, Grid(1, 128), first, x, 100);
    cudaEventRecord(ready, first);
    if (wait) cudaStreamWaitEvent(second, ready, 0);
    std::vector<float> got(100);
    cudaMemcpyAsync(got.data(), x, 400, cudaMemcpyDeviceToHost, second);
    cudaStreamSynchronize(second);
    cudaFree(x);
    cudaEventDestroy(ready);
    cudaStreamDestroy(first);
    cudaStreamDestroy(second);
    return got[0] != 2;
  };
  int caught = 0;
  for (std::uint64_t seed = 1; seed <= several; ++seed) {
    caught += wrong(seed, false);
    CHECK_FALSE(wrong(seed, true));
  }
  CHECK(caught > several / 4);
}

TEST_CASE("planted: pinned memory read before the copy into it was waited for") {
  const Fresh gpu;
  float* x = on_device(std::vector<float>(10, 3.0f));
  float* host = nullptr;
  cudaMallocHost(reinterpret_cast<void**>(&host), 40);
  cudaMemcpyAsync(host, x, 40, cudaMemcpyDeviceToHost, nullptr);
  CHECK(std::isnan(host[0]));
  cudaStreamSynchronize(nullptr);
  CHECK(host[0] == 3);
  cudaFreeHost(host);
  cudaFree(x);
}

TEST_CASE("planted: memory never written is NaN") {
  const Fresh gpu;
  float* x = nullptr;
  cudaMalloc(reinterpret_cast<void**>(&x), 400);
  launch(add_one, Grid(1, 128), nullptr, x, 100);
  for (const float value : from_device(x, 100)) CHECK(std::isnan(value));
  cudaFree(x);
}

// --- races; [hooks]: where the compiler puts them, not under AddressSanitizer

TEST_CASE("planted: a missing __syncthreads before others are read", "[hooks]") {
  const Fresh gpu;
  float *x = on_device(std::vector<float>(64, 1.0f)), *y = on_device(std::vector<float>(64));
  launch(reverse, Grid(1, 64), nullptr, y, x, true);
  cudaDeviceSynchronize();
  CHECK(virtual_gpu::take_reports().empty());
  launch(reverse, Grid(1, 64), nullptr, y, x, false);
  cudaDeviceSynchronize();
  CHECK_THAT(taken("race"), Catch::Contains("planted_test.cpp:") && Catch::Contains("without a barrier"));
  cudaFree(x);
  cudaFree(y);
}

TEST_CASE("planted: without the barrier values are wrong, too") {
  const Fresh gpu;
  std::vector<float> values(64);
  for (std::size_t i = 0; i < 64; ++i) values[i] = static_cast<float>(i);
  float *x = on_device(values), *y = on_device(std::vector<float>(64));
  launch(reverse, Grid(1, 64), nullptr, y, x, false);
  int unset = 0;
  for (const float v : from_device(y, 64)) unset += std::isnan(v);
  CHECK(unset > 0);
  virtual_gpu::take_reports();
  cudaFree(x);
  cudaFree(y);
}

TEST_CASE("planted: shared memory is written again while others may still read it", "[hooks]") {
  const Fresh gpu;
  float *x = on_device(std::vector<float>(128, 1.0f)), *y = on_device(std::vector<float>(64));
  launch(two_rounds, Grid(2, 64), nullptr, y, x, true);
  cudaDeviceSynchronize();
  CHECK(taken("race").find("shared") == std::string::npos);  // two blocks write one y: see below
  launch(two_rounds, Grid(1, 64), nullptr, y, x, false);
  cudaDeviceSynchronize();
  CHECK_THAT(taken("race"), Catch::Contains("has read, without a barrier"));
  cudaFree(x);
  cudaFree(y);
}

TEST_CASE("planted: an asynchronous copy begins while others may still read", "[hooks]") {
  const Fresh gpu;
  float4* x = on_device(std::vector<float4>(64));
  float* y = on_device(std::vector<float>(64));
  launch(copies_over_what_is_read, Grid(1, 64), nullptr, y, x, true);
  cudaDeviceSynchronize();
  CHECK(virtual_gpu::take_reports().empty());
  launch(copies_over_what_is_read, Grid(1, 64), nullptr, y, x, false);
  cudaDeviceSynchronize();
  CHECK_THAT(taken("race"), Catch::Contains("without a barrier") && Catch::Contains("planted_test.cpp:"));
  cudaFree(x);
  cudaFree(y);
}

TEST_CASE("planted: lanes of a warp exchange values without __syncwarp", "[hooks]") {
  const Fresh gpu;
  float* y = on_device(std::vector<float>(32));
  launch(exchange_in_warp, Grid(1, 32), nullptr, y, true);
  cudaDeviceSynchronize();
  CHECK(virtual_gpu::take_reports().empty());
  launch(exchange_in_warp, Grid(1, 32), nullptr, y, false);
  cudaDeviceSynchronize();
  CHECK_THAT(taken("race"), Catch::Contains("planted_test.cpp:"));
  cudaFree(y);
}

TEST_CASE("planted: blocks add to one number without an atomic", "[hooks]") {
  const Fresh gpu;
  float* total = on_device<float>({0});
  launch(count_blocks, Grid(5, 32), nullptr, total, true);
  cudaDeviceSynchronize();
  CHECK(virtual_gpu::take_reports().empty());
  launch(count_blocks, Grid(5, 32), nullptr, total, false);
  cudaDeviceSynchronize();
  CHECK_THAT(taken("race"), Catch::Contains("of the same launch has written") && Catch::Contains("planted_test.cpp:"));
  cudaFree(total);
}

TEST_CASE("the last block may read what the others wrote") {
  const Fresh gpu;
  float *total = on_device<float>({0}), *parts = on_device(std::vector<float>(7));
  unsigned* finished = on_device<unsigned>({0});
  launch(last_block_adds, Grid(7, 1), nullptr, total, parts, finished);
  CHECK(from_device(total, 1)[0] == 28);
  cudaFree(total);
  cudaFree(parts);
  cudaFree(finished);
}

// --- threads that do not meet

TEST_CASE("planted: a barrier that some threads never reach") {
  const Fresh gpu;
  float* x = on_device(std::vector<float>(64));
  launch(barrier_for_some, Grid(1, 64), nullptr, x);
  CHECK(cudaDeviceSynchronize() == cudaErrorLaunchFailure);
  CHECK_THAT(taken("divergent barrier"), Catch::Contains("10 have left the kernel") &&
                                             Catch::Contains("54 wait at the barrier") &&
                                             Catch::Contains("planted_test.cpp:"));
}

TEST_CASE("planted: threads of a block at two barriers") {
  const Fresh gpu;
  launch(barriers_apart, Grid(1, 64), nullptr);
  CHECK(cudaDeviceSynchronize() == cudaErrorLaunchFailure);
  CHECK_THAT(taken("divergent barrier"), Catch::Contains("different barriers"));
}

TEST_CASE("planted: a mask names lanes that have left or a source outside the mask is read") {
  {
    const Fresh gpu;
    int* x = on_device(std::vector<int>(32));
    launch(shuffle_without_some, Grid(1, 32), nullptr, x);
    CHECK(cudaDeviceSynchronize() == cudaErrorLaunchFailure);
    std::string kinds;
    for (const auto& r : virtual_gpu::take_reports()) kinds += r.kind + r.text;
    CHECK_THAT(kinds, Catch::Contains("left the kernel") && Catch::Contains("__shfl_sync at") &&
                          Catch::Contains("planted_test.cpp:"));
  }
  const Fresh gpu;
  int* x = on_device(std::vector<int>(32));
  launch(shuffle_from_outside, Grid(1, 32), nullptr, x);
  CHECK(cudaDeviceSynchronize() == cudaErrorLaunchFailure);
  CHECK_THAT(taken("bad mask"), Catch::Contains("lane 20"));
}

TEST_CASE("planted: 16 bytes at an address that is no multiple of 16", "[hooks]") {
  const int first = GENERATE(0, 4, 1, 2);
  const Fresh fresh;
  float* x = on_device(std::vector<float>{0, 1, 2, 3, 4, 5, 6, 7});
  float* y = on_device(std::vector<float>(4));
  launch(copy_four, Grid(1, 1), nullptr, y, x, first);
  if (first % 4 == 0) {
    CHECK(from_device(y, 4)[3] == static_cast<float>(first + 3));
    CHECK((cudaFree(x) == cudaSuccess && cudaFree(y) == cudaSuccess));
  } else {
    CHECK(cudaDeviceSynchronize() == cudaErrorMisalignedAddress);
    CHECK_THAT(taken("misaligned address"), Catch::Contains("planted_test.cpp"));
  }
}

TEST_CASE("planted: a row of ldmatrix at an address that is no multiple of 16") {
  const int first = GENERATE(0, 8, 2);
  const Fresh fresh;
  std::uint32_t* y = on_device(std::vector<std::uint32_t>(32));
  launch(load_matrix, Grid(1, 32), nullptr, y, first);
  if (first % 8 == 0) {
    CHECK(from_device(y, 1)[0] == static_cast<std::uint32_t>(2 * first + 64 + ((2 * first + 66) << 16)));
    CHECK(cudaFree(y) == cudaSuccess);
  } else {
    CHECK(cudaDeviceSynchronize() == cudaErrorMisalignedAddress);
    CHECK_THAT(taken("misaligned address"), Catch::Contains("planted_test.cpp"));
  }
}

TEST_CASE("planted: an asynchronous copy that nobody waits for") {
  const Fresh gpu;
  float4* x = on_device(std::vector<float4>(32));
  launch(never_waits, Grid(1, 32), nullptr, x);
  CHECK(cudaDeviceSynchronize() == cudaErrorLaunchFailure);
  CHECK_THAT(taken("copy not waited for"), Catch::Contains("planted_test.cpp:"));
}

// --- devices

TEST_CASE("planted: a kernel or an event on a stream of another device") {
  const Fresh gpu;
  float* x = on_device(std::vector<float>(100, 1.0f));
  cudaStream_t first;
  cudaEvent_t event;
  cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking);
  cudaSetDevice(1);
  cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  CHECK_THROWS_WITH(launch(add_one, Grid(1, 128), first, x, 100), Catch::Contains("cudaErrorInvalidResourceHandle"));
  CHECK(cudaEventRecord(event, first) == cudaErrorInvalidResourceHandle);
  CHECK(cudaGetLastError() == cudaErrorInvalidResourceHandle);
  CHECK(cudaEventRecord(event, nullptr) == cudaSuccess);
  cudaSetDevice(0);
  launch(add_one, Grid(1, 128), first, x, 100);
  CHECK(cudaStreamWaitEvent(first, event, 0) == cudaSuccess);
  CHECK(cudaStreamSynchronize(first) == cudaSuccess);
  cudaEventDestroy(event);
  cudaStreamDestroy(first);
  cudaFree(x);
}

// --- memory

TEST_CASE("one element beyond the end", "[.]") {
  float* x = on_device(std::vector<float>(100, 1.0f));
  launch(add_one, Grid(1, 128), nullptr, x, 101);
  cudaDeviceSynchronize();
}
TEST_CASE("planted: a kernel writes one element beyond the end") {
  CHECK_THAT(planted("one element beyond the end"),
             Catch::Contains("byte 400 of device memory of 400 bytes") || Catch::Contains("use-after-poison"));
}

TEST_CASE("one element beyond shared memory", "[.]") {
  float* x = on_device(std::vector<float>(1));
  launch(beyond_shared, Grid(1, 32), nullptr, x);
  cudaDeviceSynchronize();
}
TEST_CASE("planted: a kernel writes one element beyond a shared array") {
  CHECK_THAT(
      planted("one element beyond shared memory"),
      Catch::Contains("0 bytes beyond the end of the shared array tile at") || Catch::Contains("use-after-poison"));
}

// The launch that asks is kernels/cuda/language.h's; this one is CUDA's.
TEST_CASE("planted: static and dynamic shared memory that nobody asked for is more than a block gets") {
  const std::size_t dynamic = GENERATE(48 << 10, (48 << 10) - 512);
  const Fresh gpu;
  float* x = on_device(std::vector<float>(1));
  make_launchable(uses_both_kinds);
  cudaLaunchConfig_t config{};
  config.gridDim = config.blockDim = 1;
  config.dynamicSmemBytes = dynamic;
  REQUIRE(cudaLaunchKernelEx(&config, uses_both_kinds, x) == cudaSuccess);
  if (dynamic == 48 << 10) {
    CHECK(cudaDeviceSynchronize() == cudaErrorLaunchFailure);
    CHECK_THAT(taken("shared memory"), Catch::Contains("512 bytes of static and 49152 of dynamic"));
  } else {
    CHECK(from_device(x, 1)[0] == 2);
    CHECK(cudaFree(x) == cudaSuccess);
  }
}

TEST_CASE("planted: a write beyond the end that nothing observes is found when the memory is freed") {
  const Fresh gpu;
  char* x = on_device(std::vector<char>(100));
  launch(quietly_beyond, Grid(1, 1), nullptr, x, 100);
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
  CHECK(cudaFree(x) == cudaSuccess);
  CHECK_THAT(taken("out of bounds"), Catch::Contains("written 0 bytes beyond the end of device memory of 100 bytes"));
}

TEST_CASE("a kernel uses freed memory", "[.]") {
  float* x = on_device(std::vector<float>(100, 1.0f));
  cudaFree(x);
  launch(add_one, Grid(1, 128), nullptr, x, 100);
  cudaDeviceSynchronize();
}
TEST_CASE("planted: use after free") {
  CHECK_THAT(planted("a kernel uses freed memory"),
             Catch::Contains("device memory of 400 bytes, freed") || Catch::Contains("use-after-poison"));
}

TEST_CASE("memory of another stream's cudaMallocAsync", "[.]") {
  cudaStream_t stream;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  float* x = nullptr;
  cudaMallocAsync(reinterpret_cast<void**>(&x), 400, stream);
  launch(add_one, Grid(1, 128), nullptr, x, 100);
  cudaStreamSynchronize(nullptr);
}
TEST_CASE("planted: memory used before the stream has allocated it") {
  std::string all;
  for (const char* seed : {"VIRTUAL_GPU_SEED=1", "VIRTUAL_GPU_SEED=2", "VIRTUAL_GPU_SEED=3", "VIRTUAL_GPU_SEED=4"})
    all += Process({seed, self(), "memory of another stream's cudaMallocAsync"}).wait().output;
  CHECK_THAT(all, Catch::Contains("not yet allocated in stream order") || Catch::Contains("use-after-poison"));
}

TEST_CASE("the host reads device memory", "[.]") {
  const float* x = on_device(std::vector<float>(100, 1.0f));
  cudaDeviceSynchronize();
  CHECK(x[0] == 1);
}
TEST_CASE("planted: host code reads device memory") {
  CHECK_THAT(planted("the host reads device memory"), Catch::Contains("host code touches device memory of 400 bytes"));
}
TEST_CASE("the host reads device memory without protection keys", "[.]") {
  virtual_gpu::restart(Options{.protection_keys = false});
  const float* x = on_device(std::vector<float>(100, 1.0f));
  CHECK(from_device(x, 100)[99] == 1);
  CHECK(x[0] == 1);
}
TEST_CASE("planted: host code reads device memory, on a machine without protection keys") {
  CHECK_THAT(planted("the host reads device memory without protection keys"),
             Catch::Contains("host code touches device memory of 400 bytes"));
}

TEST_CASE("planted: a kernel gets a pointer to the host's memory", "[hooks]") {
  const Fresh gpu;
  std::vector<float> host(100);
  launch(add_one, Grid(1, 128), nullptr, host.data(), 100);
  CHECK(cudaDeviceSynchronize() == cudaErrorIllegalAddress);
  CHECK_THAT(taken("illegal address"),
             Catch::Contains("host memory that is not pinned") && Catch::Contains("planted_test.cpp:"));
}

TEST_CASE("planted: memory of another device without peer access", "[hooks]") {
  const Fresh gpu;
  float* x = on_device(std::vector<float>(100, 1.0f));
  cudaDeviceSynchronize();
  cudaSetDevice(1);
  cudaDeviceEnablePeerAccess(0, 0);
  launch(add_one, Grid(1, 128), nullptr, x, 100);
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
  cudaDeviceDisablePeerAccess(0);
  launch(add_one, Grid(1, 128), nullptr, x, 100);
  CHECK(cudaDeviceSynchronize() == cudaErrorIllegalAddress);
  CHECK_THAT(taken("illegal address"), Catch::Contains("without cudaDeviceEnablePeerAccess"));
}

TEST_CASE("planted: double free, free in the middle, free of the host's memory") {
  const Fresh gpu;
  char* x = on_device(std::vector<char>(100));
  CHECK(cudaFree(x + 1) == cudaErrorInvalidValue);
  CHECK_THAT(taken("bad free"), Catch::Contains("byte 1 of device memory of 100 bytes"));
  CHECK(cudaFree(x) == cudaSuccess);
  CHECK(cudaFree(x) == cudaErrorInvalidValue);
  CHECK_THAT(taken("double free"), Catch::Contains("device memory of 100 bytes, freed"));
  int on_stack;
  CHECK(cudaFree(&on_stack) == cudaErrorInvalidValue);
  CHECK_THAT(taken("bad free"), Catch::Contains("memory of the host"));
}

TEST_CASE("planted: a copy that is longer than its memory") {
  const Fresh gpu;
  char* x = on_device(std::vector<char>(100));
  std::vector<char> host(101);
  CHECK(cudaMemcpy(host.data(), x, 101, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue);
  CHECK_THAT(taken("illegal address"), Catch::Contains("cudaMemcpy: 101 bytes from device memory of 100 bytes"));
  cudaGetLastError();
  CHECK(cudaMemset(x + 50, 0, 51) == cudaErrorInvalidValue);
  CHECK_THAT(taken("illegal address"), Catch::Contains("cudaMemset: 51 bytes from byte 50"));
  cudaGetLastError();
  cudaFree(x);
}

TEST_CASE("planted: leaks") {
  const Fresh gpu;
  void *device, *pinned;
  cudaStream_t stream;
  cudaEvent_t event;
  cudaMalloc(&device, 12);
  cudaMallocHost(&pinned, 13);
  cudaStreamCreate(&stream);
  cudaEventCreate(&event);
  virtual_gpu::report_leaks();
  const std::string leaks = taken("leak");
  CHECK_THAT(leaks, Catch::Contains("device memory of 12 bytes") && Catch::Contains("pinned host memory of 13 bytes"));
  CHECK_THAT(leaks, Catch::Contains("a stream") && Catch::Contains("an event"));
  cudaFree(device);
  cudaFreeHost(pinned);
  cudaStreamDestroy(stream);
  cudaEventDestroy(event);
}

// --- errors

TEST_CASE("planted: an error that nobody looks at") {
  const Fresh gpu;
  virtual_gpu::fail("cudaMalloc", 1, cudaErrorMemoryAllocation);
  float* x = nullptr;
  cudaMalloc(reinterpret_cast<void**>(&x), 400);
  cudaStream_t stream;
  cudaStreamCreate(&stream);
  CHECK_THAT(taken("error not checked"), Catch::Contains("cudaMalloc failed (cudaErrorMemoryAllocation)") &&
                                             Catch::Contains("went on with cudaStreamCreate"));
  // Looked at, cleared, gone on: as it should be.
  virtual_gpu::fail("cudaMalloc", 1, cudaErrorMemoryAllocation);
  CHECK(cudaMalloc(reinterpret_cast<void**>(&x), 400) == cudaErrorMemoryAllocation);
  CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
  CHECK(cudaGetLastError() == cudaSuccess);
  CHECK(cudaMalloc(reinterpret_cast<void**>(&x), 400) == cudaSuccess);
  cudaFree(x);
  cudaStreamDestroy(stream);
}

TEST_CASE("leaves memory behind", "[.]") {
  void* x;
  CHECK(cudaMalloc(&x, 77) == cudaSuccess);
}
TEST_CASE("a process with reports that nobody took ends with 98") {
  Process process({self(), "leaves memory behind"});
  const Process::Result result = process.wait();
  CHECK(result.code == 98);
  CHECK_THAT(result.output, Catch::Contains("leak: device memory of 77 bytes"));
}
