// The device language does what CUDA's documents say: every function against plain loops.
#include <numeric>

#include "kernels/cuda/language.h"
#include "virtual_gpu/fresh.h"

using namespace distill;
using namespace distill::cuda;
using virtual_gpu::Fresh;
using virtual_gpu::from_device;
using virtual_gpu::on_device;

namespace {

__global__ void which(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = static_cast<int>(1000 * block + thread);
}

// sums[block] = Σ x over the block's threads, by warps and shared memory.
__global__ void block_sums(float* sums, const float* x, int n) {
  SHARED_ARRAY(float, partial, 32);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  float value = i < n ? x[i] : 0.0f;
  for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(0xffffffffu, value, d);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x < 32) {
    float sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f;
    for (int d = 16; d > 0; d /= 2) sum += __shfl_down_sync(0xffffffffu, sum, static_cast<unsigned>(d));
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
  }
}

__global__ void warp_functions(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int k = 0;
  const auto put = [&](int value) { out[32 * k++ + lane] = value; };
  put(__shfl_sync(0xffffffffu, lane, 5));
  put(__shfl_sync(0xffffffffu, lane, 5, 8));
  put(__shfl_up_sync(0xffffffffu, lane, 3));
  put(__shfl_up_sync(0xffffffffu, lane, 3, 16));
  put(__shfl_down_sync(0xffffffffu, lane, 3));
  put(__shfl_down_sync(0xffffffffu, lane, 3, 16));
  put(__shfl_xor_sync(0xffffffffu, lane, 9));
  put(static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0)));
  put(__any_sync(0xffffffffu, lane == 31));
  put(__all_sync(0xffffffffu, lane < 31));
  // Halves that go their own ways.
  if (lane < 16)
    put(__shfl_sync(0x0000ffffu, lane, 2));
  else
    put(__shfl_sync(0xffff0000u, lane, 20));
  put(__syncthreads_count(lane % 2));
  put(__syncthreads_or(lane == 7));
  put(__syncthreads_and(lane != 7));
}

__global__ void atomics(int* integers, float* floats, double* doubles, unsigned long long* longs) {
  atomicAdd(&integers[0], 1);
  atomicMax(&integers[1], static_cast<int>(threadIdx.x * (blockIdx.x + 1)));
  atomicMin(&integers[2], -static_cast<int>(threadIdx.x));
  atomicCAS(&integers[3], 7, 8);
  atomicOr(&integers[4], 1 << threadIdx.x);
  atomicAdd(floats, 0.5f);
  atomicAdd(doubles, 0.25);
  atomicAdd(longs, 1ull << 33);
}

template <class T>
__global__ void multiply(float* d, const T* a, const T* b) {
  SHARED_ARRAY(T, a_tile, 16 * 16);
  SHARED_ARRAY(T, b_tile, 16 * 8);
  for (unsigned i = threadIdx.x; i < 16 * 16; i += 32) a_tile[i] = a[i];
  for (unsigned i = threadIdx.x; i < 16 * 8; i += 32) b_tile[i] = b[i];
  __syncwarp();
  // A row by row: matrices top left, bottom left, top right, bottom right; B [16, 8] row by row, so transposed.
  const unsigned lane = threadIdx.x;
  std::uint32_t a_part[4], b_part[2];
  ldmatrix_x4(a_part, &a_tile[16 * (lane % 16) + lane / 16 * 8]);
  ldmatrix_x2_transposed(b_part, &b_tile[8 * (lane % 16)]);
  float sum[4] = {};
  mma_m16n8k16(sum, a_part, b_part, T{});
  const unsigned g = lane / 4, i = lane % 4;
  d[8 * g + 2 * i] = sum[0];
  d[8 * g + 2 * i + 1] = sum[1];
  d[8 * (g + 8) + 2 * i] = sum[2];
  d[8 * (g + 8) + 2 * i + 1] = sum[3];
}

__global__ void copies(float4* out, const float4* in, int n) {
  float4* tile = dynamic_shared<float4>();
  copy_async_16(&tile[threadIdx.x], &in[threadIdx.x], static_cast<int>(threadIdx.x) < n);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

__global__ void arithmetic(float* out, float x) {
  out[0] = __expf(x);
  out[1] = __logf(x);
  out[2] = __fdividef(x, 3);
  out[3] = rsqrtf(x);
  out[4] = __int_as_float(__float_as_int(x));
  out[5] = static_cast<float>(__popc(0xf0f0u) + __clz(1) + __ffs(8));
  out[6] = static_cast<float>(max(3, 4u) + min(2, 1));
}

constexpr dim3 one(1);

}  // namespace

TEST_CASE("every thread of every block has its own indices") {
  const Fresh gpu;
  int* out = on_device(std::vector<int>(24 * 30));
  launch(which, Grid(dim3(2, 3, 4), dim3(5, 3, 2)), nullptr, out);
  const std::vector<int> got = from_device(out, 24 * 30);
  for (int i = 0; i < 24 * 30; ++i) CHECK(got[static_cast<std::size_t>(i)] == 1000 * (i / 30) + i % 30);
  CHECK(cudaFree(out) == cudaSuccess);
}

TEST_CASE("block reductions by shuffles and shared memory add up") {
  const Fresh gpu;
  std::vector<float> values(700);
  std::iota(values.begin(), values.end(), 1.0f);
  float *x = on_device(values), *sums = on_device(std::vector<float>(3));
  launch(block_sums, Grid(3, 256), nullptr, sums, x, 700);
  const std::vector<float> got = from_device(sums, 3);
  CHECK(got[0] == 256 * 257 / 2);
  CHECK(got[0] + got[1] + got[2] == 700 * 701 / 2);
  cudaFree(x);
  cudaFree(sums);
}

TEST_CASE("shuffles, votes, reductions of a warp and of its halves") {
  const Fresh gpu;
  int* out = on_device(std::vector<int>(14 * 32));
  launch(warp_functions, Grid(1, 32), nullptr, out);
  const std::vector<int> got = from_device(out, 14 * 32);
  int thirds = 0;
  for (int l = 0; l < 32; l += 3) thirds |= 1 << l;
  for (int l = 0; l < 32; ++l) {
    CAPTURE(l);
    const int expected[] = {5,
                            l / 8 * 8 + 5,
                            l < 3 ? l : l - 3,
                            l % 16 < 3 ? l : l - 3,
                            l > 28 ? l : l + 3,
                            l % 16 > 12 ? l : l + 3,
                            l ^ 9,
                            thirds,
                            1,
                            0,
                            l < 16 ? 2 : 20,
                            16,
                            1,
                            0};
    for (int k = 0; k < 14; ++k) {
      CAPTURE(k);
      CHECK(got[static_cast<std::size_t>(32 * k + l)] == expected[k]);
    }
  }
  cudaFree(out);
}

TEST_CASE("atomics of all threads of all blocks") {
  const Fresh gpu;
  int* integers = on_device<int>({0, 0, 0, 7, 0});
  float* floats = on_device<float>({0});
  double* doubles = on_device<double>({0});
  unsigned long long* longs = on_device<unsigned long long>({0});
  launch(atomics, Grid(3, 20), nullptr, integers, floats, doubles, longs);
  CHECK(from_device(integers, 5) == std::vector<int>{60, 57, -19, 8, (1 << 20) - 1});
  CHECK(from_device(floats, 1)[0] == 30);
  CHECK(from_device(doubles, 1)[0] == 15);
  CHECK(from_device(longs, 1)[0] == 60ull << 33);
  for (void* p : {static_cast<void*>(integers), static_cast<void*>(floats), static_cast<void*>(doubles),
                  static_cast<void*>(longs)})
    cudaFree(p);
}

TEMPLATE_TEST_CASE("ldmatrix and mma multiply [16, 16] by [16, 8]", "", bf16, f16) {
  const Fresh gpu;
  std::vector<TestType> a(16 * 16), b(16 * 8);
  for (std::size_t i = 0; i < a.size(); ++i) a[i] = TestType(static_cast<float>((i * 37) % 19) - 9);
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = TestType(static_cast<float>((i * 53) % 23) - 11);
  TestType *a_there = on_device(a), *b_there = on_device(b);
  float* d = on_device(std::vector<float>(16 * 8));
  launch(multiply<TestType>, Grid(one, 32), nullptr, d, a_there, b_there);
  const std::vector<float> got = from_device(d, 16 * 8);
  for (std::size_t r = 0; r < 16; ++r)
    for (std::size_t c = 0; c < 8; ++c) {
      float sum = 0;  // small integers: exact in any order
      for (std::size_t k = 0; k < 16; ++k) sum += float(a[16 * r + k]) * float(b[8 * k + c]);
      CHECK(got[8 * r + c] == sum);
    }
  cudaFree(a_there);
  cudaFree(b_there);
  cudaFree(d);
}

TEST_CASE("asynchronous copies arrive when waited for, zeros where there is nothing") {
  const Fresh gpu;
  std::vector<float4> values(64);
  for (std::size_t i = 0; i < 64; ++i) values[i] = make_float4(float(i), 0, 0, float(i));
  float4 *in = on_device(values), *out = on_device(std::vector<float4>(64));
  launch(copies, Grid(1, 64, 64 * sizeof(float4)), nullptr, out, in, 60);
  const std::vector<float4> got = from_device(out, 64);
  for (std::size_t i = 0; i < 64; ++i) CHECK(got[i].w == (63 - i < 60 ? float(63 - i) : 0.0f));
  cudaFree(in);
  cudaFree(out);
}

TEST_CASE("arithmetic by CUDA's names") {
  const Fresh gpu;
  float* out = on_device(std::vector<float>(7));
  launch(arithmetic, Grid(1, 1), nullptr, out, 2.5f);
  const std::vector<float> got = from_device(out, 7);
  CHECK(got[0] == Approx(std::exp(2.5)));
  CHECK(got[1] == Approx(std::log(2.5)));
  CHECK(got[2] == Approx(2.5 / 3));
  CHECK(got[3] == Approx(1 / std::sqrt(2.5)));
  CHECK(got[4] == 2.5f);
  CHECK(got[5] == 8 + 31 + 4);
  CHECK(got[6] == 5);
  cudaFree(out);
}

TEST_CASE("a launch that CUDA would refuse says so at the caller's line") {
  const Fresh gpu;
  int* out = on_device(std::vector<int>(1));
  const auto message = [&](const Grid& grid) {
    try {
      launch(which, grid, nullptr, out);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  CHECK_THAT(message(Grid(1, 1025)),
             Catch::Contains("cudaErrorInvalidConfiguration") && Catch::Contains("executor_test.cpp:"));
  cudaGetLastError();
  CHECK_THAT(message(Grid(1, 32, 228 << 10)),
             Catch::Contains("needs 233472 bytes of shared memory a block, this GPU gives 232448"));
  cudaGetLastError();
  // More than 48 KiB must be asked for, which launch() does.
  cudaLaunchConfig_t config{};
  config.gridDim = config.blockDim = dim3(1);
  config.dynamicSmemBytes = 49 << 10;
  CHECK(cudaLaunchKernelEx(&config, which, out) == cudaErrorInvalidValue);
  cudaGetLastError();
  CHECK(message(Grid(1, 1, 49 << 10)).empty());
  CHECK(cudaLaunchKernelEx(&config, which, out) == cudaSuccess);
  CHECK(message(Grid(0, 32)).empty());
  cudaFree(out);
}
