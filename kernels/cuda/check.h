// Every call of the CUDA runtime goes through cuda_check. For host code; a .cu file includes language.h.
#pragma once

#include <cuda_runtime_api.h>

#include <source_location>

#include "core/error.h"

namespace distill::cuda {

// Throws Error (internal) that names the error, its meaning and the line of the call.
inline void cuda_check(cudaError_t result, const std::source_location& where = std::source_location::current()) {
  if (result == cudaSuccess) [[likely]]
    return;
  cudaGetLastError();  // told here, and not once more by a later call
  fail(cudaGetErrorName(result), " (", cudaGetErrorString(result), ") at ", where.file_name(), ":", where.line());
}

}  // namespace distill::cuda
