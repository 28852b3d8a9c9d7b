#include "kernels/cuda/attention.cuh"

template void distill::cuda::run_attention<double>(const AttentionCall&, View, View, cudaStream_t);
template void distill::cuda::run_attention_backward<double>(const AttentionCall&, View, View, View, const ConstView&,
                                                            const ConstView&, const ConstView&, void*, cudaStream_t);
