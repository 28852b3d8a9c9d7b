#include "kernels/cuda/attention.cuh"

template void distill::cuda::run_attention<distill::f16>(const AttentionCall&, View, View, cudaStream_t);
template void distill::cuda::run_attention_backward<distill::f16>(const AttentionCall&, View, View, View,
                                                                  const ConstView&, const ConstView&, const ConstView&,
                                                                  void*, cudaStream_t);
