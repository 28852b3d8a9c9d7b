#include "kernels/cuda/loss.cuh"

template void distill::cuda::run_loss<double, double>(const LossCall&);
