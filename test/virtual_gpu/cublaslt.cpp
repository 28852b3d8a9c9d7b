// cuBLASLt's matrix product, as far as the CUDA backend uses it: column-major operands, both transposes,
// D = alpha op(A) op(B) + beta C (+ bias). Put on the stream like any other work. Types, from the table of
// cublasLtMatmul in the cuBLAS documentation: sums in f32 (f64 for f64), output and bias of the operands' type or f32;
// all else is refused, also what the table has beyond these (TF32, f16 sums, 8 bits, complex). Stricter than the
// library: an algorithm is good for the product that it was found for only, and needs the alignment that was promised.
#include <cublasLt.h>

#include <cstring>

#include "core/number.h"
#include "virtual_gpu/internal.h"

namespace virtual_gpu {
namespace {

struct Layout {
  cudaDataType type;
  std::int64_t rows, cols, stride;
};
struct Product {
  cublasComputeType_t compute;
  cudaDataType scale;
  std::int32_t a_op = CUBLAS_OP_N, b_op = CUBLAS_OP_N;
  std::uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const void* bias = nullptr;
  std::int32_t bias_type = -1;  // that of D
};
struct Preference {
  std::size_t workspace = 0;
  std::uint32_t alignment[4] = {256, 256, 256, 256};  // of A, B, C, D in bytes
};
// What an algorithm found by the heuristic was found for.
struct Algorithm {
  std::uint64_t magic;
  std::uint64_t workspace;
  std::uint64_t problem;
  std::uint32_t alignment[4];
};
static_assert(sizeof(Algorithm) <= sizeof(cublasLtMatmulAlgo_t));
constexpr std::uint64_t algorithm_magic = 0x616c676f00000001;
constexpr std::size_t wanted_workspace = 64 << 10, workspace_alignment = 256;

std::size_t size_of_type(cudaDataType type) {
  switch (type) {
    case CUDA_R_16BF:
    case CUDA_R_16F:
      return 2;
    case CUDA_R_32F:
      return 4;
    case CUDA_R_64F:
      return 8;
    default:
      return 0;
  }
}

cublasStatus_t library_call(const char* name, const std::function<cublasStatus_t()>& body) {
  const Held held(lock);
  if (const int planned = planned_failure(name)) return static_cast<cublasStatus_t>(planned);
  if (state().lost != cudaSuccess) return CUBLAS_STATUS_EXECUTION_FAILED;
  return body();
}

// Makes what a handle of theirs stands for, and counts it.
template <class Ours, class Handle>
cublasStatus_t create(Handle* handle, Ours value) {
  ++state().handles["cuBLASLt handles and descriptors"];
  *handle = reinterpret_cast<Handle>(new Ours(value));
  return CUBLAS_STATUS_SUCCESS;
}
template <class Ours, class Handle>
cublasStatus_t destroy(Handle handle) {
  --state().handles["cuBLASLt handles and descriptors"];
  delete reinterpret_cast<Ours*>(handle);
  return CUBLAS_STATUS_SUCCESS;
}
template <class T>
cublasStatus_t set_to(T& field, const void* value, std::size_t bytes) {
  if (value == nullptr || bytes != sizeof field) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&field, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

struct Operands {
  Product product;
  const char *a, *b, *c;
  char* d;
  Layout a_layout, b_layout, c_layout, d_layout;
  double alpha, beta;
  char* workspace;
  std::size_t workspace_bytes;
};

bool supported(const Operands& o) {
  const cudaDataType in = o.a_layout.type, out = o.d_layout.type;
  if (in != o.b_layout.type || out != o.c_layout.type || size_of_type(in) == 0) return false;
  if (in == CUDA_R_64F) return o.product.compute == CUBLAS_COMPUTE_64F && o.product.scale == CUDA_R_64F && out == in;
  return o.product.compute == CUBLAS_COMPUTE_32F && o.product.scale == CUDA_R_32F && (out == in || out == CUDA_R_32F);
}

// A number for all that an algorithm is found for.
std::uint64_t problem_of(const Operands& o) {
  const Product& p = o.product;
  std::uint64_t hash = 0;
  const auto add = [&](auto part) { hash = (hash ^ static_cast<std::uint64_t>(part)) * 0x9e3779b97f4a7c15 + 1; };
  add(p.compute), add(p.scale), add(p.a_op), add(p.b_op), add(p.epilogue), add(p.bias_type);
  for (const Layout& l : {o.a_layout, o.b_layout, o.c_layout, o.d_layout})
    add(l.type), add(l.rows), add(l.cols), add(l.stride);
  return hash;
}

bool shapes_fit(const Operands& o) {
  const bool a_t = o.product.a_op != CUBLAS_OP_N, b_t = o.product.b_op != CUBLAS_OP_N;
  const Layout &a = o.a_layout, &b = o.b_layout, &c = o.c_layout, &d = o.d_layout;
  const std::int64_t m = a_t ? a.cols : a.rows, k = a_t ? a.rows : a.cols, n = b_t ? b.rows : b.cols;
  return k == (b_t ? b.cols : b.rows) && m == d.rows && n == d.cols && c.rows == d.rows && c.cols == d.cols &&
         a.stride >= a.rows && b.stride >= b.rows && c.stride >= c.rows && d.stride >= d.rows;
}

std::size_t bytes_of(const Layout& l) {
  if (l.rows == 0 || l.cols == 0) return 0;
  return static_cast<std::size_t>(l.stride * (l.cols - 1) + l.rows) * size_of_type(l.type);
}

bool in_bounds(const Operands& o, bool now) {
  return check_range("cublasLtMatmul: A", o.a, bytes_of(o.a_layout), now) &&
         check_range("cublasLtMatmul: B", o.b, bytes_of(o.b_layout), now) &&
         (o.beta == 0 || check_range("cublasLtMatmul: C", o.c, bytes_of(o.c_layout), now)) &&
         check_range("cublasLtMatmul: D", o.d, bytes_of(o.d_layout), now) &&
         check_range("cublasLtMatmul: workspace", o.workspace, o.workspace_bytes, now) &&
         (o.product.bias == nullptr ||
          check_range("cublasLtMatmul: bias", o.product.bias,
                      static_cast<std::size_t>(o.d_layout.rows) * size_of_type(o.d_layout.type), now));
}

template <class Acc>
Acc load(const char* matrix, cudaDataType type, std::int64_t i) {
  switch (type) {
    case CUDA_R_16BF:
      return static_cast<Acc>(static_cast<float>(reinterpret_cast<const distill::bf16*>(matrix)[i]));
    case CUDA_R_16F:
      return static_cast<Acc>(static_cast<float>(reinterpret_cast<const distill::f16*>(matrix)[i]));
    case CUDA_R_32F:
      return static_cast<Acc>(reinterpret_cast<const float*>(matrix)[i]);
    default:
      return static_cast<Acc>(reinterpret_cast<const double*>(matrix)[i]);
  }
}
template <class Acc>
void store(char* matrix, cudaDataType type, std::int64_t i, Acc x) {
  switch (type) {
    case CUDA_R_16BF:
      reinterpret_cast<distill::bf16*>(matrix)[i] = distill::bf16(static_cast<float>(x));
      break;
    case CUDA_R_16F:
      reinterpret_cast<distill::f16*>(matrix)[i] = distill::f16(static_cast<float>(x));
      break;
    case CUDA_R_32F:
      reinterpret_cast<float*>(matrix)[i] = static_cast<float>(x);
      break;
    default:
      reinterpret_cast<double*>(matrix)[i] = static_cast<double>(x);
  }
}

// op(matrix), column by column without gaps.
template <class Acc>
std::vector<Acc> packed(const char* matrix, const Layout& l, bool transposed) {
  std::vector<Acc> all(static_cast<std::size_t>(l.rows * l.cols));
  for (std::int64_t c = 0; c < l.cols; ++c)
    for (std::int64_t r = 0; r < l.rows; ++r)
      all[static_cast<std::size_t>(transposed ? r * l.cols + c : c * l.rows + r)] =
          load<Acc>(matrix, l.type, c * l.stride + r);
  return all;
}

// sums[m] += a[m, k] b[k], a column by column, in the order of k.
template <class Acc>
__attribute__((target_clones("avx512f", "avx2", "default"))) void add_product(Acc* sums, const Acc* a, const Acc* b,
                                                                              std::int64_t m, std::int64_t k) {
  std::int64_t p = 0;
  for (; p + 4 <= k; p += 4) {
    const Acc *a0 = a + p * m, *a1 = a0 + m, *a2 = a1 + m, *a3 = a2 + m;
    for (std::int64_t row = 0; row < m; ++row)
      sums[row] = sums[row] + a0[row] * b[p] + a1[row] * b[p + 1] + a2[row] * b[p + 2] + a3[row] * b[p + 3];
  }
  for (; p < k; ++p)
    for (std::int64_t row = 0; row < m; ++row) sums[row] += a[p * m + row] * b[p];
}

template <class Acc>
void multiply(const Operands& o) {
  const std::vector<Acc> a = packed<Acc>(o.a, o.a_layout, o.product.a_op != CUBLAS_OP_N);
  const std::vector<Acc> b = packed<Acc>(o.b, o.b_layout, o.product.b_op != CUBLAS_OP_N);
  const std::int64_t m = o.d_layout.rows, n = o.d_layout.cols;
  const std::int64_t k = o.product.a_op != CUBLAS_OP_N ? o.a_layout.rows : o.a_layout.cols;
  std::vector<Acc> sums(static_cast<std::size_t>(m));
  for (std::int64_t col = 0; col < n; ++col) {
    std::fill(sums.begin(), sums.end(), Acc(0));
    add_product(sums.data(), a.data(), b.data() + col * k, m, k);
    for (std::int64_t row = 0; row < m; ++row) {
      Acc x = static_cast<Acc>(o.alpha) * sums[static_cast<std::size_t>(row)];
      if (o.beta != 0) x += static_cast<Acc>(o.beta) * load<Acc>(o.c, o.c_layout.type, col * o.c_layout.stride + row);
      if (o.product.bias != nullptr) x += load<Acc>(static_cast<const char*>(o.product.bias), o.d_layout.type, row);
      store(o.d, o.d_layout.type, col * o.d_layout.stride + row, x);
    }
  }
}

bool run(const Operands& o) {
  if (!in_bounds(o, true)) {
    state().lost = cudaErrorIllegalAddress;
    return true;
  }
  if (o.workspace_bytes > 0) std::memset(o.workspace, 0xFF, o.workspace_bytes);  // it is the library's meanwhile
  if (o.a_layout.type == CUDA_R_64F)
    multiply<double>(o);
  else
    multiply<float>(o);
  return true;
}

}  // namespace
}  // namespace virtual_gpu

using namespace virtual_gpu;

size_t cublasLtGetVersion() { return CUBLAS_VERSION; }

const char* cublasLtGetStatusName(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_ALLOC_FAILED:
      return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_EXECUTION_FAILED:
      return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_INTERNAL_ERROR:
      return "CUBLAS_STATUS_INTERNAL_ERROR";
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
    default:
      return "an unknown status of cuBLAS";
  }
}
const char* cublasLtGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  return library_call("cublasLtCreate", [&] { return create(handle, 0); });
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  return library_call("cublasLtDestroy", [&] { return destroy<int>(handle); });
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* handle, cudaDataType type, uint64_t rows,
                                          uint64_t cols, int64_t stride) {
  return library_call("cublasLtMatrixLayoutCreate", [&] {
    return create(handle, Layout{type, static_cast<std::int64_t>(rows), static_cast<std::int64_t>(cols), stride});
  });
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t handle) {
  return library_call("cublasLtMatrixLayoutDestroy", [&] { return destroy<Layout>(handle); });
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* handle, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
  return library_call("cublasLtMatmulDescCreate",
                      [&] { return create(handle, Product{.compute = compute, .scale = scale}); });
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t handle) {
  return library_call("cublasLtMatmulDescDestroy", [&] { return destroy<Product>(handle); });
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t handle, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
  return library_call("cublasLtMatmulDescSetAttribute", [&] {
    Product& p = *reinterpret_cast<Product*>(handle);
    switch (attribute) {
      case CUBLASLT_MATMUL_DESC_TRANSA:
        return set_to(p.a_op, value, bytes);
      case CUBLASLT_MATMUL_DESC_TRANSB:
        return set_to(p.b_op, value, bytes);
      case CUBLASLT_MATMUL_DESC_EPILOGUE:
        return set_to(p.epilogue, value, bytes);
      case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
        return set_to(p.bias, value, bytes);
      case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
        return set_to(p.bias_type, value, bytes);
      default:
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
  });
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* handle) {
  return library_call("cublasLtMatmulPreferenceCreate", [&] { return create(handle, Preference{}); });
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t handle) {
  return library_call("cublasLtMatmulPreferenceDestroy", [&] { return destroy<Preference>(handle); });
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t handle,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                                    size_t bytes) {
  return library_call("cublasLtMatmulPreferenceSetAttribute", [&] {
    Preference& p = *reinterpret_cast<Preference*>(handle);
    switch (attribute) {
      case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
        return set_to(p.workspace, value, bytes);
      case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
        return set_to(p.alignment[0], value, bytes);
      case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
        return set_to(p.alignment[1], value, bytes);
      case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
        return set_to(p.alignment[2], value, bytes);
      case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
        return set_to(p.alignment[3], value, bytes);
      default:
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
  });
}

namespace {

Operands operands_of(cublasLtMatmulDesc_t product, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                     cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d) {
  Operands o{};
  o.product = *reinterpret_cast<Product*>(product);
  if (o.product.epilogue != CUBLASLT_EPILOGUE_BIAS) o.product.bias = nullptr;
  o.a_layout = *reinterpret_cast<Layout*>(a);
  o.b_layout = *reinterpret_cast<Layout*>(b);
  o.c_layout = *reinterpret_cast<Layout*>(c);
  o.d_layout = *reinterpret_cast<Layout*>(d);
  return o;
}
cublasStatus_t refusal(const Operands& o) {
  if (!shapes_fit(o)) return CUBLAS_STATUS_INVALID_VALUE;
  if (!supported(o)) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (o.product.epilogue != CUBLASLT_EPILOGUE_DEFAULT && o.product.epilogue != CUBLASLT_EPILOGUE_BIAS)
    return CUBLAS_STATUS_NOT_SUPPORTED;
  if (o.product.bias_type >= 0 && o.product.bias_type != o.d_layout.type) return CUBLAS_STATUS_NOT_SUPPORTED;
  return CUBLAS_STATUS_SUCCESS;
}
// What only the pointers show.
bool pointers_fit(const Operands& o) {
  const std::pair<const char*, const Layout*> all[] = {
      {o.a, &o.a_layout}, {o.b, &o.b_layout}, {o.c, &o.c_layout}, {o.d, &o.d_layout}};
  for (const auto& [data, l] : all)
    if (reinterpret_cast<std::uintptr_t>(data) % size_of_type(l->type) != 0) return false;
  return o.c != o.d || o.c_layout.stride == o.d_layout.stride;  // in place: one layout
}
// Fills in what the algorithm needs.
cublasStatus_t use(const Algorithm& algorithm, Operands& o, void* workspace, std::size_t bytes) {
  if (algorithm.magic != algorithm_magic || algorithm.workspace > bytes ||
      reinterpret_cast<std::uintptr_t>(workspace) % workspace_alignment != 0)
    return CUBLAS_STATUS_INVALID_VALUE;
  if (algorithm.problem != problem_of(o)) {
    report("wrong algorithm", "cublasLtMatmul: the algorithm was found for another product");
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const char* pointers[] = {o.a, o.b, o.c, o.d};
  for (int i = 0; i < 4; ++i)
    if (reinterpret_cast<std::uintptr_t>(pointers[i]) % algorithm.alignment[i] != 0) {
      report("misaligned address", join("cublasLtMatmul: ", std::string(1, "ABCD"[i]), " is not aligned to the ",
                                        algorithm.alignment[i], " bytes that its algorithm was found for"));
      return CUBLAS_STATUS_INVALID_VALUE;
    }
  o.workspace = static_cast<char*>(workspace);
  o.workspace_bytes = algorithm.workspace;
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t product, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int,
                                              cublasLtMatmulHeuristicResult_t* results, int* found) {
  return library_call("cublasLtMatmulAlgoGetHeuristic", [&] {
    *found = 0;
    const Operands o = operands_of(product, a, b, c, d);
    const cublasStatus_t refused = refusal(o);
    if (refused != CUBLAS_STATUS_SUCCESS) return refused;
    const Preference& p = *reinterpret_cast<Preference*>(preference);
    Algorithm algorithm{algorithm_magic, std::min(p.workspace, wanted_workspace), problem_of(o), {}};
    std::copy_n(p.alignment, 4, algorithm.alignment);
    results[0] = {};
    std::memcpy(&results[0].algo, &algorithm, sizeof algorithm);
    results[0].workspaceSize = algorithm.workspace;
    results[0].state = CUBLAS_STATUS_SUCCESS;
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
  });
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t product, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                              const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algo, void* workspace,
                              size_t workspace_bytes, cudaStream_t handle) {
  return library_call("cublasLtMatmul", [&] {
    Operands o = operands_of(product, a_layout, b_layout, c_layout, d_layout);
    const cublasStatus_t refused = refusal(o);
    if (refused != CUBLAS_STATUS_SUCCESS) return refused;
    o.a = static_cast<const char*>(a), o.b = static_cast<const char*>(b), o.c = static_cast<const char*>(c);
    o.d = static_cast<char*>(d);
    const bool is_f64 = o.product.scale == CUDA_R_64F;
    o.alpha = is_f64 ? *static_cast<const double*>(alpha) : static_cast<double>(*static_cast<const float*>(alpha));
    o.beta = is_f64 ? *static_cast<const double*>(beta) : static_cast<double>(*static_cast<const float*>(beta));
    if (!pointers_fit(o)) return CUBLAS_STATUS_INVALID_VALUE;
    if (algo != nullptr) {
      Algorithm algorithm;
      std::memcpy(&algorithm, algo, sizeof algorithm);
      const cublasStatus_t unusable = use(algorithm, o, workspace, workspace_bytes);
      if (unusable != CUBLAS_STATUS_SUCCESS) return unusable;
    }
    const auto stream = stream_of(handle);
    if (stream == nullptr || !in_bounds(o, false)) return CUBLAS_STATUS_INVALID_VALUE;
    enqueue(stream, {"cublasLtMatmul", [o] { return run(o); }, {}});
    return CUBLAS_STATUS_SUCCESS;
  });
}
