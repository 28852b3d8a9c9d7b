#include "kernels/cuda/loss.cuh"

template void distill::cuda::run_loss<float, distill::bf16>(const LossCall&);
