// Matrix products by cuBLASLt.
#pragma once

#include <cublasLt.h>

#include <cstdint>
#include <unordered_map>

#include "core/device.h"
#include "kernels/cuda/cuda_memory.h"

namespace distill::cuda {

class MatrixProduct {
 public:
  MatrixProduct(const std::shared_ptr<MemoryUse>& use, const std::string& device);
  // c (+)= a b on the stream; none is empty.
  void run(View c, const Factor& a, const Factor& b, Write write, cudaStream_t stream);

 private:
  // A product as cuBLASLt sees it, column by column: x [m, k] y [k, n].
  struct Shape {
    std::int64_t m, n, k, x_stride, y_stride, c_stride;
    DType in, out;
    bool x_transposed, y_transposed;
    std::uint32_t x_alignment, y_alignment, c_alignment;  // bytes
    bool operator==(const Shape&) const = default;
  };
  struct Hash {
    std::size_t operator()(const Shape& s) const;
  };
  struct Plan {
    Handle<cublasLtMatmulDesc_t, &cublasLtMatmulDescDestroy> product;
    Handle<cublasLtMatrixLayout_t, &cublasLtMatrixLayoutDestroy> x, y, c;
    cublasLtMatmulAlgo_t algorithm{};
  };
  const Plan& plan(const Shape& shape);
  Plan make_plan(const Shape& shape) const;

  Handle<cublasLtHandle_t, &cublasLtDestroy> library_;
  DeviceScratch workspace_;
  std::unordered_map<Shape, Plan, Hash> plans_;
};

std::string cublas_version();

}  // namespace distill::cuda
