// Stands for cudnn_attention.cpp where cuDNN was not found.
#include "kernels/cuda/library_attention.h"

namespace distill::cuda {

std::unique_ptr<LibraryAttention> make_library_attention(std::shared_ptr<MemoryUse>, const std::string&, cudaStream_t,
                                                         const Warn& warn) {
  warn("attn_implementation: sdpa: this program was built without cuDNN; our own attention is used");
  return nullptr;
}

std::string cudnn_version() { return "no cuDNN"; }

}  // namespace distill::cuda
