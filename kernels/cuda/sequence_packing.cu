#include "kernels/cuda/language.h"  // before what includes the toolkit's headers

#include "kernels/cuda/sequence_packing.h"

#include "kernels/cuda/memory.cuh"

namespace distill::cuda {

namespace {

// A thread for each sequence, and one for where the last ends.
__global__ void pack_sequences_kernel(PackedSequences to, const std::int32_t* begins, std::int32_t count) {
  const std::int64_t s = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (s > to.sequences) return;
  const std::int64_t begin = begins[s < count ? s : count];
  if (s < to.sequences) to.lengths[s] = s < count ? std::int32_t(begins[s + 1] - begin) : 0;
  for (int i = 0; i < to.operands; ++i) to.offsets[i * (to.sequences + 1) + s] = begin * to.strides[i];
}

}  // namespace

void pack_sequences(const PackedSequences& to, const Segments& from, cudaStream_t stream) {
  constexpr int threads = 128;
  launch(pack_sequences_kernel, Grid(as_blocks(blocks_for(to.sequences + 1, threads)), threads), stream, to,
         from.offsets.as<std::int32_t>(), std::int32_t(from.count()));
}

}  // namespace distill::cuda
