// Attention by cuDNN, where the library is there; without it no_cudnn.cpp stands for it.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "kernels/cuda/attention.h"

namespace distill::cuda {

using Warn = std::function<void(const std::string&)>;

// What cuDNN does not take is left to the caller: a call then does nothing and returns false. `warn` hears why, once
// for each direction. log_sum is the same as that of our own kernels, so either may follow the other.
class LibraryAttention {
 public:
  virtual ~LibraryAttention() = default;
  LibraryAttention() = default;
  LibraryAttention(const LibraryAttention&) = delete;
  virtual bool forward(const AttentionCall& call, View out, View log_sum) = 0;
  virtual bool backward(const AttentionCall& call, View dq, View dk, View dv, const ConstView& dout,
                        const ConstView& out, const ConstView& log_sum) = 0;
};

// For the GPU that is current. Null where cuDNN cannot be used, and `warn` hears why.
std::unique_ptr<LibraryAttention> make_library_attention(std::shared_ptr<MemoryUse> use, const std::string& device,
                                                         cudaStream_t stream, const Warn& warn);
// "cuDNN 9.19.0", "no cuDNN"
std::string cudnn_version();

}  // namespace distill::cuda
