// f32 products stay f32 (CUBLAS_COMPUTE_32F never takes TF32), so they agree with the CPU's to rounding. On one stream
// the library's results are the same bits from run to run for the same shapes and the same GPU model.
#include "kernels/cuda/gemm.h"

#include <algorithm>

namespace distill::cuda {

namespace {

// Hopper's kernels want 32 MiB; older ones less.
constexpr std::size_t workspace_bytes = 32 << 20;
// The number of tokens changes with every micro-batch, so shapes come and go.
constexpr std::size_t most_plans = 8192;

void cublas_check(cublasStatus_t status, const std::source_location& where = std::source_location::current()) {
  if (status != CUBLAS_STATUS_SUCCESS) [[unlikely]]
    fail("cuBLASLt: ", cublasLtGetStatusString(status), " at ", where.file_name(), ":", where.line());
}

cudaDataType_t cuda_type(DType type) {
  switch (type) {
    case DType::f32:
      return CUDA_R_32F;
    case DType::bf16:
      return CUDA_R_16BF;
    case DType::f16:
      return CUDA_R_16F;
    case DType::f64:
      return CUDA_R_64F;
    default:
      fail("no product of ", name_of(type));
  }
}

// The largest power of two, at most 256, that divides the address and the bytes from one column to the next.
std::uint32_t alignment_of(const ConstView& v) {
  const std::uintptr_t bits = reinterpret_cast<std::uintptr_t>(v.data) | (std::uintptr_t(v.stride) * size_of(v.dtype));
  return std::uint32_t(std::min<std::uintptr_t>(bits & -bits, 256));
}

template <class T>
void set(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t attribute, T value) {
  cublas_check(cublasLtMatmulDescSetAttribute(product, attribute, &value, sizeof value));
}
template <class T>
void set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute, T value) {
  cublas_check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value));
}

// rows × cols as it lies in memory, column by column.
auto layout(DType type, std::int64_t rows, std::int64_t cols, std::int64_t stride) {
  cublasLtMatrixLayout_t made{};
  cublas_check(cublasLtMatrixLayoutCreate(&made, cuda_type(type), std::uint64_t(rows), std::uint64_t(cols), stride));
  return Handle<cublasLtMatrixLayout_t, &cublasLtMatrixLayoutDestroy>(made);
}

// A single row may have any stride in a view; the library wants one that a whole row fits in.
std::int64_t stride_of(const ConstView& v) { return std::max(v.stride, v.cols); }

}  // namespace

std::string cublas_version() {
  const std::size_t v = cublasLtGetVersion();
  return text("cuBLASLt ", v / 10000, ".", v / 100 % 100, ".", v % 100);
}

MatrixProduct::MatrixProduct(const std::shared_ptr<MemoryUse>& use, const std::string& device)
    : workspace_(use, device) {
  cublasLtHandle_t library{};
  cublas_check(cublasLtCreate(&library));
  library_ = Handle<cublasLtHandle_t, &cublasLtDestroy>(library);
}

std::size_t MatrixProduct::Hash::operator()(const Shape& s) const {
  std::size_t hash = 0;
  for (const std::int64_t part :
       {s.m, s.n, s.k, s.x_stride, s.y_stride, s.c_stride,
        std::int64_t(s.in) | std::int64_t(s.out) << 8 | std::int64_t(s.x_transposed) << 16 |
            std::int64_t(s.y_transposed) << 17,
        std::int64_t(s.x_alignment) | std::int64_t(s.y_alignment) << 16 | std::int64_t(s.c_alignment) << 32})
    hash = (hash ^ std::size_t(part)) * 0x9e3779b97f4a7c15u, hash ^= hash >> 32;
  return hash;
}

MatrixProduct::Plan MatrixProduct::make_plan(const Shape& s) const {
  Plan plan;
  const DType wide = wide_type(s.in);
  cublasLtMatmulDesc_t product{};
  cublas_check(cublasLtMatmulDescCreate(&product, wide == DType::f64 ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F,
                                        cuda_type(wide)));
  plan.product = Handle<cublasLtMatmulDesc_t, &cublasLtMatmulDescDestroy>(product);
  set(product, CUBLASLT_MATMUL_DESC_TRANSA, s.x_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(product, CUBLASLT_MATMUL_DESC_TRANSB, s.y_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
  plan.x = s.x_transposed ? layout(s.in, s.k, s.m, s.x_stride) : layout(s.in, s.m, s.k, s.x_stride);
  plan.y = s.y_transposed ? layout(s.in, s.n, s.k, s.y_stride) : layout(s.in, s.k, s.n, s.y_stride);
  plan.c = layout(s.out, s.m, s.n, s.c_stride);

  cublasLtMatmulPreference_t made{};
  cublas_check(cublasLtMatmulPreferenceCreate(&made));
  const Handle<cublasLtMatmulPreference_t, &cublasLtMatmulPreferenceDestroy> preference(made);
  set(made, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes);
  set(made, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, s.x_alignment);
  set(made, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, s.y_alignment);
  set(made, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, s.c_alignment);
  set(made, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, s.c_alignment);
  cublasLtMatmulHeuristicResult_t best{};
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(library_.get(), product, plan.x.get(), plan.y.get(),
                                                               plan.c.get(), plan.c.get(), made, 1, &best, &found);
  if (status != CUBLAS_STATUS_NOT_SUPPORTED) cublas_check(status);  // which is how it says that there is none
  check(found == 1 && best.state == CUBLAS_STATUS_SUCCESS, "cuBLASLt has no kernel for ", name_of(s.in), " [", s.n, ",",
        s.k, "] × [", s.k, ",", s.m, "] to ", name_of(s.out));
  plan.algorithm = best.algo;
  return plan;
}

const MatrixProduct::Plan& MatrixProduct::plan(const Shape& shape) {
  const auto known = plans_.find(shape);
  if (known != plans_.end()) return known->second;
  if (plans_.size() >= most_plans) plans_.clear();
  return plans_.emplace(shape, make_plan(shape)).first->second;
}

// Rows of ours are columns of theirs: cᵀ = bᵀ aᵀ.
void MatrixProduct::run(View c, const Factor& a, const Factor& b, Write write, cudaStream_t stream) {
  const Plan& p =
      plan({c.cols, c.rows, a.cols(), stride_of(b.matrix), stride_of(a.matrix), stride_of(c), a.matrix.dtype, c.dtype,
            b.is_transposed, a.is_transposed, alignment_of(b.matrix), alignment_of(a.matrix), alignment_of(c)});
  const double one = 1, zero = 0;
  const float one_f = 1, zero_f = 0;
  const bool is_f64 = a.matrix.dtype == DType::f64, adds = write == Write::accumulate;
  const void* alpha = is_f64 ? static_cast<const void*>(&one) : &one_f;
  const void* beta = is_f64 ? static_cast<const void*>(adds ? &one : &zero) : adds ? &one_f : &zero_f;
  cublas_check(cublasLtMatmul(library_.get(), p.product.get(), alpha, b.matrix.data, p.x.get(), a.matrix.data,
                              p.y.get(), beta, c.data, p.c.get(), c.mutable_data(), p.c.get(), &p.algorithm,
                              workspace_.bytes(workspace_bytes), workspace_bytes, stream));
}

}  // namespace distill::cuda
