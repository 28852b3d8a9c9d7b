#include "kernels/cuda/loss.cuh"

template void distill::cuda::run_loss<float, distill::f16>(const LossCall&);
