#include "kernels/cuda/loss.cuh"

template void distill::cuda::run_loss<float, float>(const LossCall&);
