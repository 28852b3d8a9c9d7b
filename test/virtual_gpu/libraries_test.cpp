// The subset of cuBLASLt against plain loops in double, and of NCCL between threads and between processes.
#include <cublasLt.h>
#include <nccl.h>
#include <signal.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <thread>

#include "core/number.h"
#include "support/process.h"
#include "virtual_gpu/fresh.h"

using distill::bf16;
using distill::f16;
using distill::test::Process;
using virtual_gpu::Fresh;
using virtual_gpu::from_device;
using virtual_gpu::on_device;
using virtual_gpu::taken;

namespace {

template <class T>
constexpr cudaDataType cuda_type = std::is_same_v<T, bf16>     ? CUDA_R_16BF
                                   : std::is_same_v<T, f16>    ? CUDA_R_16F
                                   : std::is_same_v<T, double> ? CUDA_R_64F
                                                               : CUDA_R_32F;

template <class T>
std::vector<T> numbers(std::size_t n, int seed) {
  std::vector<T> x(n);
  for (std::size_t i = 0; i < n; ++i)
    x[i] = T(static_cast<float>((i * 29 + static_cast<std::size_t>(seed)) % 17) / 8 - 1);
  return x;
}

struct Case {
  bool a_transposed, b_transposed;
  float beta;
  bool bias;
};

// D [m, n] = op(A) op(B) + beta C (+ bias), column by column with gaps between columns; largest error over the largest
// value.
template <class In, class Out>
double product_error(const Case& p) {
  using Scale = std::conditional_t<std::is_same_v<In, double>, double, float>;
  constexpr int m = 13, n = 9, k = 21, gap = 3;
  const int a_rows = p.a_transposed ? k : m, b_rows = p.b_transposed ? n : k;
  const int a_cols = p.a_transposed ? m : k, b_cols = p.b_transposed ? k : n;
  const auto a = numbers<In>(std::size_t(a_cols * (a_rows + gap)), 1);
  const auto b = numbers<In>(std::size_t(b_cols * (b_rows + gap)), 2);
  const auto c = numbers<Out>(std::size_t(n * (m + gap)), 3);
  const auto bias = numbers<Out>(m, 4);
  In *a_there = on_device(a), *b_there = on_device(b);
  Out *c_there = on_device(c), *bias_there = on_device(bias);

  cublasLtHandle_t library;
  cublasLtMatmulDesc_t product;
  cublasLtMatrixLayout_t la, lb, lc;
  REQUIRE(cublasLtCreate(&library) == CUBLAS_STATUS_SUCCESS);
  cublasLtMatmulDescCreate(&product, sizeof(Scale) == 8 ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, cuda_type<Scale>);
  const std::int32_t a_op = p.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
                     b_op = p.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &a_op, sizeof a_op);
  cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSB, &b_op, sizeof b_op);
  if (p.bias) {
    const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias_there, sizeof bias_there);
  }
  cublasLtMatrixLayoutCreate(&la, cuda_type<In>, std::uint64_t(a_rows), std::uint64_t(a_cols), a_rows + gap);
  cublasLtMatrixLayoutCreate(&lb, cuda_type<In>, std::uint64_t(b_rows), std::uint64_t(b_cols), b_rows + gap);
  cublasLtMatrixLayoutCreate(&lc, cuda_type<Out>, m, n, m + gap);
  const Scale alpha = 1, beta = static_cast<Scale>(p.beta);
  CHECK(cublasLtMatmul(library, product, &alpha, a_there, la, b_there, lb, &beta, c_there, lc, c_there, lc, nullptr,
                       nullptr, 0, nullptr) == CUBLAS_STATUS_SUCCESS);
  CHECK(virtual_gpu::pending() > 0);
  const std::vector<Out> d = from_device(c_there, c.size());

  double error = 0, largest = 0;
  for (int col = 0; col < n; ++col)
    for (int row = 0; row < m; ++row) {
      double sum = p.bias ? double(static_cast<Scale>(bias[std::size_t(row)])) : 0;
      for (int i = 0; i < k; ++i) {
        const int ai = p.a_transposed ? row * (a_rows + gap) + i : i * (a_rows + gap) + row;
        const int bi = p.b_transposed ? i * (b_rows + gap) + col : col * (b_rows + gap) + i;
        sum += double(static_cast<Scale>(a[std::size_t(ai)])) * double(static_cast<Scale>(b[std::size_t(bi)]));
      }
      const std::size_t at = std::size_t(col * (m + gap) + row);
      sum += double(p.beta) * double(static_cast<Scale>(c[at]));
      error = std::max(error, std::abs(sum - double(static_cast<Scale>(d[at]))));
      largest = std::max(largest, std::abs(sum));
    }
  for (int col = 0; col < n; ++col)  // the gaps are left alone
    for (int row = m; row < m + gap; ++row) {
      const std::size_t at = std::size_t(col * (m + gap) + row);
      CHECK(std::memcmp(&d[at], &c[at], sizeof(Out)) == 0);
    }
  cublasLtMatrixLayoutDestroy(la);
  cublasLtMatrixLayoutDestroy(lb);
  cublasLtMatrixLayoutDestroy(lc);
  cublasLtMatmulDescDestroy(product);
  cublasLtDestroy(library);
  cudaFree(a_there);
  cudaFree(b_there);
  cudaFree(c_there);
  cudaFree(bias_there);
  return error / largest;
}

// Runs body(rank, communicator, stream) for ranks that are threads, each on a device of its own.
template <class Body>
void on_ranks(int ranks, const Body& body) {
  ncclUniqueId id;
  REQUIRE(ncclGetUniqueId(&id) == ncclSuccess);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank)
    threads.emplace_back([&, rank] {
      cudaSetDevice(rank);
      ncclComm_t comm = nullptr;
      cudaStream_t stream;
      cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
      if (ncclCommInitRank(&comm, ranks, id, rank) != ncclSuccess) std::abort();
      body(rank, comm, stream);
      cudaStreamSynchronize(stream);
      ncclCommDestroy(comm);
      cudaStreamDestroy(stream);
    });
  for (auto& t : threads) t.join();
}

// A buffer on the current device; in and out through the stream.
struct Buffer {
  float* data = nullptr;
  explicit Buffer(const std::vector<float>& values) {
    cudaMalloc(reinterpret_cast<void**>(&data), values.size() * 4);
    cudaMemcpy(data, values.data(), values.size() * 4, cudaMemcpyHostToDevice);
    cudaDeviceSynchronize();
  }
  ~Buffer() { cudaFree(data); }
  Buffer(const Buffer&) = delete;
  std::vector<float> read(std::size_t n, cudaStream_t stream) const {
    std::vector<float> values(n);
    cudaMemcpyAsync(values.data(), data, n * 4, cudaMemcpyDeviceToHost, stream);
    cudaStreamSynchronize(stream);
    return values;
  }
};

std::string self() { return std::filesystem::read_symlink("/proc/self/exe"); }
std::string hex(const ncclUniqueId& id) {
  std::string digits;
  for (const char byte : id.internal) {
    char two[3];
    std::snprintf(two, sizeof two, "%02x", static_cast<unsigned char>(byte));
    digits += two;
  }
  return digits;
}

}  // namespace

TEST_CASE("products of all types and transposes, accumulated, with a bias") {
  const Fresh gpu;
  for (const Case& p : {Case{false, false, 0, false}, Case{true, false, 1, false}, Case{false, true, 0.5f, true},
                        Case{true, true, 0, true}}) {
    CHECK(product_error<float, float>(p) < 1e-6);
    CHECK(product_error<double, double>(p) < 1e-15);
    CHECK(product_error<bf16, float>(p) < 1e-6);
    CHECK(product_error<bf16, bf16>(p) < 1.0 / 256);
    CHECK(product_error<f16, float>(p) < 1e-6);
    CHECK(product_error<f16, f16>(p) < 1.0 / 2048);
  }
}

// One product of 8 × 8 matrices, columns `stride` apart; c_stride: that of C, which D lies upon.
struct Small {
  cudaDataType in = CUDA_R_32F, b = in, out = in;
  cublasComputeType_t compute = CUBLAS_COMPUTE_32F;
  cudaDataType scale = CUDA_R_32F, bias = out;
  int stride = 8, c_stride = stride, offset = 0;  // offset: bytes by which A begins later
};
cublasStatus_t run(const Small& s) {
  const double zero = 0;  // of any type
  cublasLtHandle_t library;
  cublasLtMatmulDesc_t product;
  cublasLtMatrixLayout_t a, b, c, d;
  cublasLtCreate(&library);
  cublasLtMatmulDescCreate(&product, s.compute, s.scale);
  const std::int32_t epilogue = CUBLASLT_EPILOGUE_BIAS, bias_type = s.bias;
  char* const x = on_device(std::vector<char>(2048));
  cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
  cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &x, sizeof x);
  cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &bias_type, sizeof bias_type);
  cublasLtMatrixLayoutCreate(&a, s.in, 8, 8, s.stride);
  cublasLtMatrixLayoutCreate(&b, s.b, 8, 8, s.stride);
  cublasLtMatrixLayoutCreate(&c, s.out, 8, 8, s.c_stride);
  cublasLtMatrixLayoutCreate(&d, s.out, 8, 8, s.stride);
  char* const y = on_device(std::vector<char>(2048));
  const cublasStatus_t status =
      cublasLtMatmul(library, product, &zero, x + s.offset, a, x, b, &zero, y, c, y, d, nullptr, nullptr, 0, nullptr);
  cudaDeviceSynchronize();
  for (const cublasLtMatrixLayout_t layout : {a, b, c, d}) cublasLtMatrixLayoutDestroy(layout);
  cublasLtMatmulDescDestroy(product);
  cublasLtDestroy(library);
  cudaFree(x);
  cudaFree(y);
  return status;
}

TEST_CASE("number types that cuBLASLt's table does not list are refused") {
  const Fresh gpu;
  constexpr cudaDataType f32 = CUDA_R_32F, bf16_type = CUDA_R_16BF, f16_type = CUDA_R_16F, f64 = CUDA_R_64F;
  for (const cudaDataType type : {f32, bf16_type, f16_type}) {
    CHECK(run({.in = type}) == CUBLAS_STATUS_SUCCESS);
    CHECK(run({.in = type, .out = f32}) == CUBLAS_STATUS_SUCCESS);
  }
  CHECK(run({.in = f64, .compute = CUBLAS_COMPUTE_64F, .scale = f64}) == CUBLAS_STATUS_SUCCESS);
  const Small refused[] = {{.in = f32, .out = bf16_type},
                           {.in = f32, .out = f16_type},
                           {.in = bf16_type, .out = f16_type},
                           {.in = bf16_type, .b = f16_type},
                           {.in = bf16_type, .b = f32, .out = f32},
                           {.in = bf16_type, .out = f32, .bias = bf16_type},
                           {.in = bf16_type, .bias = f32},
                           {.in = f64},
                           {.in = f64, .compute = CUBLAS_COMPUTE_64F},
                           {.in = f64, .out = f32, .compute = CUBLAS_COMPUTE_64F, .scale = f64},
                           {.in = f32, .out = f64, .compute = CUBLAS_COMPUTE_64F, .scale = f64},
                           {.in = f32, .compute = CUBLAS_COMPUTE_64F, .scale = f64},
                           {.in = bf16_type, .scale = bf16_type},
                           {.in = bf16_type, .compute = CUBLAS_COMPUTE_16F},
                           {.in = CUDA_R_32I}};
  for (const Small& s : refused) {
    CAPTURE(s.in, s.b, s.out, s.compute, s.scale, s.bias);
    CHECK(run(s) == CUBLAS_STATUS_NOT_SUPPORTED);
  }
}

TEST_CASE("layouts and addresses that no kernel takes are refused") {
  const Fresh gpu;
  CHECK(run({.stride = 11}) == CUBLAS_STATUS_SUCCESS);
  CHECK(run({.in = CUDA_R_16BF, .stride = 9, .offset = 2}) == CUBLAS_STATUS_SUCCESS);
  CHECK(run({.stride = 7}) == CUBLAS_STATUS_INVALID_VALUE);
  CHECK(run({.offset = 2}) == CUBLAS_STATUS_INVALID_VALUE);
  CHECK(run({.stride = 11, .c_stride = 8}) == CUBLAS_STATUS_INVALID_VALUE);  // in place
}

TEST_CASE("an algorithm holds for the alignment that it was asked for, and its workspace is its own") {
  const Fresh gpu;
  cublasLtHandle_t library;
  cublasLtMatmulDesc_t product;
  cublasLtMatrixLayout_t layout, wrong;
  cublasLtMatmulPreference_t preference;
  cublasLtCreate(&library);
  cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  cublasLtMatrixLayoutCreate(&layout, CUDA_R_32F, 8, 8, 8);
  cublasLtMatrixLayoutCreate(&wrong, CUDA_R_32F, 8, 7, 8);
  cublasLtMatmulPreferenceCreate(&preference);
  const std::size_t most = 1024;
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most, sizeof most);
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  CHECK(cublasLtMatmulAlgoGetHeuristic(library, product, layout, layout, wrong, layout, preference, 1, &found,
                                       &count) == CUBLAS_STATUS_INVALID_VALUE);
  REQUIRE(cublasLtMatmulAlgoGetHeuristic(library, product, layout, layout, layout, layout, preference, 1, &found,
                                         &count) == CUBLAS_STATUS_SUCCESS);
  REQUIRE(count == 1);
  float *x = on_device(std::vector<float>(65, 1.0f)), *y = on_device(std::vector<float>(64));
  float* workspace = on_device(std::vector<float>(256));
  const float one = 1, zero = 0;
  const auto multiply = [&](const float* a, std::size_t bytes) {
    return cublasLtMatmul(library, product, &one, a, layout, a, layout, &zero, y, layout, y, layout, &found.algo,
                          workspace, bytes, nullptr);
  };
  CHECK(multiply(x, 1024) == CUBLAS_STATUS_SUCCESS);
  CHECK(from_device(y, 64)[63] == 8);
  CHECK(std::isnan(from_device(workspace, 256)[255]));
  CHECK(multiply(x, 512) == CUBLAS_STATUS_INVALID_VALUE);
  CHECK(multiply(x + 1, 1024) == CUBLAS_STATUS_INVALID_VALUE);
  CHECK_THAT(taken("misaligned address"), Catch::Contains("A is not aligned to the 256 bytes"));
  ++workspace;
  CHECK(multiply(x, 1000) == CUBLAS_STATUS_INVALID_VALUE);
  --workspace;
  virtual_gpu::fail("cublasLtMatmul", 1, CUBLAS_STATUS_EXECUTION_FAILED);
  CHECK(multiply(x, 1024) == CUBLAS_STATUS_EXECUTION_FAILED);
  const std::int32_t transposed = CUBLAS_OP_T;
  cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed);
  CHECK(multiply(x, 1024) == CUBLAS_STATUS_INVALID_VALUE);
  CHECK_THAT(taken("wrong algorithm"), Catch::Contains("found for another product"));
  cublasLtMatmulPreferenceDestroy(preference);
  cublasLtMatrixLayoutDestroy(layout);
  cublasLtMatrixLayoutDestroy(wrong);
  cublasLtMatmulDescDestroy(product);
  virtual_gpu::report_leaks();
  CHECK_THAT(taken("leak"), Catch::Contains("1 of cuBLASLt handles"));
  cublasLtDestroy(library);
  for (float* p : {x, y, workspace}) cudaFree(p);
}

TEST_CASE("collectives of three threads, several in flight, in place") {
  const Fresh gpu;
  std::vector<std::vector<float>> got(3);
  on_ranks(3, [&](int rank, ncclComm_t comm, cudaStream_t stream) {
    const float r = static_cast<float>(rank);
    const Buffer x({r, 1, 2, 3, 4, 5}), part({0, 0}), all({0, 0, 0, 0, 0, 0});
    ncclAllReduce(x.data, x.data, 6, ncclFloat32, ncclSum, comm, stream);                        // 3 3 6 9 12 15
    ncclReduceScatter(x.data, part.data, 2, ncclFloat32, ncclMax, comm, stream);                 // two of them each
    ncclAllGather(part.data, all.data, 2, ncclFloat32, comm, stream);                            // all again
    ncclBroadcast(rank == 1 ? part.data : nullptr, part.data, 2, ncclFloat32, 1, comm, stream);  // 6 9
    got[static_cast<std::size_t>(rank)] = all.read(6, stream);
    const auto two = part.read(2, stream);
    got[static_cast<std::size_t>(rank)].insert(got[static_cast<std::size_t>(rank)].end(), two.begin(), two.end());
  });
  for (const auto& values : got) CHECK(values == std::vector<float>{3, 3, 6, 9, 12, 15, 6, 9});
}

// bf16 has 256 and 258, and nothing between: 256 + 1 + 1 is 258 when rounded once.
TEST_CASE("sums of 16-bit numbers are rounded at every addition") {
  const Fresh gpu;
  using Pair = std::array<bf16, 2>;
  std::vector<Pair> got(3);
  on_ranks(3, [&](int rank, ncclComm_t comm, cudaStream_t stream) {
    const Buffer x({std::bit_cast<float>(Pair{bf16(rank == 0 ? 256.0f : 1.0f), bf16(1.0f)})});
    ncclAllReduce(x.data, x.data, 2, ncclBfloat16, ncclSum, comm, stream);
    got[static_cast<std::size_t>(rank)] = std::bit_cast<Pair>(x.read(1, stream)[0]);
  });
  for (const auto& [rounded, exact] : got) {
    CHECK(float(rounded) == 256);
    CHECK(float(exact) == 3);
  }
}

TEST_CASE("messages in a group go round a ring, the same twice") {
  const Fresh gpu;
  std::vector<float> got(3);
  on_ranks(3, [&](int rank, ncclComm_t comm, cudaStream_t stream) {
    const Buffer mine({static_cast<float>(rank)}), theirs({0});
    for (int round = 0; round < 2; ++round) {
      ncclGroupStart();
      ncclSend(round == 0 ? mine.data : theirs.data, 1, ncclFloat32, (rank + 1) % 3, comm, stream);
      ncclRecv(round == 0 ? theirs.data : mine.data, 1, ncclFloat32, (rank + 2) % 3, comm, stream);
      ncclGroupEnd();
    }
    got[static_cast<std::size_t>(rank)] = mine.read(1, stream)[0];
  });
  CHECK(got == std::vector<float>{1, 2, 0});
}

TEST_CASE("planted: two sends that meet outside a group stand still until they are aborted") {
  const Fresh gpu;
  std::atomic<int> ready{0}, arrived{0}, ended{0};
  on_ranks(2, [&](int rank, ncclComm_t comm, cudaStream_t stream) {
    const Buffer x({0, 0});
    ncclSend(x.data, 1, ncclFloat32, 1 - rank, comm, stream);
    ncclRecv(x.data, 1, ncclFloat32, 1 - rank, comm, stream);
    for (int i = 0; i < 100; ++i) ready += cudaStreamQuery(stream) == cudaSuccess;
    for (++arrived; arrived < 2;) usleep(100);
    ncclCommAbort(comm);
    ended += cudaStreamSynchronize(stream) == cudaSuccess;
  });
  CHECK(ready == 0);
  CHECK(ended == 2);
  CHECK_THAT(taken("bad communicator"), Catch::Contains("was destroyed"));  // on_ranks destroys what was aborted
}

TEST_CASE("planted: ranks that disagree about a collective") {
  const Fresh gpu;
  std::atomic<int> told{0};
  on_ranks(2, [&](int rank, ncclComm_t comm, cudaStream_t stream) {
    const Buffer x({0, 0});
    ncclAllReduce(x.data, x.data, static_cast<std::size_t>(1 + rank), ncclFloat32, ncclSum, comm, stream);
    ncclResult_t error = ncclSuccess;
    while (error == ncclSuccess) {
      cudaStreamQuery(stream);
      ncclCommGetAsyncError(comm, &error);
    }
    told += error == ncclInvalidUsage;
    ncclCommAbort(comm);
    cudaStreamSynchronize(stream);
  });
  CHECK(told == 2);
  std::string mismatch;
  for (const auto& r : virtual_gpu::take_reports())
    if (r.kind == "collective mismatch") mismatch = r.text;
  CHECK_THAT(mismatch, Catch::Contains("ncclAllReduce of 1") && Catch::Contains("ncclAllReduce of 2"));
}

// The other process: joins, adds, and dies in the middle of the next collective.
TEST_CASE("rank 1 of two processes", "[.]") {
  ncclUniqueId id;
  const std::string digits = std::getenv("NCCL_ID");
  for (std::size_t i = 0; i < sizeof id.internal; ++i)
    id.internal[i] = static_cast<char>(std::stoi(digits.substr(2 * i, 2), nullptr, 16));
  cudaSetDevice(1);
  ncclComm_t comm;
  REQUIRE(ncclCommInitRank(&comm, 2, id, 1) == ncclSuccess);
  const Buffer x({1, 2});
  REQUIRE(ncclAllReduce(x.data, x.data, 2, ncclFloat32, ncclSum, comm, nullptr) == ncclSuccess);
  CHECK(x.read(2, nullptr) == std::vector<float>{11, 22});
  raise(SIGKILL);
}
TEST_CASE("two processes reduce, one dies, the other is told and can abort") {
  const Fresh gpu;
  ncclUniqueId id;
  ncclGetUniqueId(&id);
  Process other({"NCCL_ID=" + hex(id), self(), "rank 1 of two processes"});
  ncclComm_t comm;
  REQUIRE(ncclCommInitRank(&comm, 2, id, 0) == ncclSuccess);
  const Buffer x({10, 20});
  ncclAllReduce(x.data, x.data, 2, ncclFloat32, ncclSum, comm, nullptr);
  CHECK(x.read(2, nullptr) == std::vector<float>{11, 22});
  CHECK(other.wait().code == 128 + SIGKILL);
  ncclAllReduce(x.data, x.data, 2, ncclFloat32, ncclSum, comm, nullptr);
  ncclResult_t error = ncclSuccess;
  for (int i = 0; i < 100000 && error == ncclSuccess; ++i) {
    CHECK(cudaStreamQuery(nullptr) == cudaErrorNotReady);
    ncclCommGetAsyncError(comm, &error);
  }
  CHECK(error == ncclRemoteError);
  CHECK(ncclCommAbort(comm) == ncclSuccess);
  CHECK(cudaStreamSynchronize(nullptr) == cudaSuccess);
}

TEST_CASE("two ranks on one device are refused") {
  const Fresh gpu;
  ncclUniqueId id;
  ncclGetUniqueId(&id);
  ncclResult_t results[2];
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < 2; ++rank)
    ranks.emplace_back([&, rank] {
      ncclComm_t comm;
      results[rank] = ncclCommInitRank(&comm, 2, id, rank);
    });
  for (auto& t : ranks) t.join();
  CHECK(results[0] == ncclInvalidUsage);
  CHECK(results[1] == ncclInvalidUsage);
  CHECK_THAT(taken("duplicate device"), Catch::Contains("ranks 0 and 1"));
}
