// Matrix products: bf16 and f32 by oneDNN, f16 widened to f32 tile by tile, f64 by plain loops.
#pragma once

#include <memory>

#include "core/device.h"

namespace distill {

class MatrixProduct {
 public:
  explicit MatrixProduct(int threads);
  ~MatrixProduct();
  // Contract: Device::gemm.
  void run(View c, const Factor& a, const Factor& b, Write write);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace distill
