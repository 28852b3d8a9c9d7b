// The GPUs that a test runs on, beyond what the program under test sees of them: this machine's (cuda_gpus.cpp), or
// virtual ones, which delay what no event orders (virtual_gpus.cpp). A program links one of the two files.
//
// Tags of cases: [one gpu] takes one GPU for all ranks; [two gpus] one for each, that reach each other; [nccl] one for
// each; [apart] two that do not reach each other; [virtual] virtual ones. Without a tag: as many as there are.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace distill::test {

struct GpuSetup {
  std::uint64_t seed = 1;   // order of independent streams
  bool peer_access = true;  // whether GPUs reach each other
};
// Before a test makes its device. Virtual GPUs start over; real ones are as they are.
void set_up_gpus(const GpuSetup& setup = {});

// Columns of a tensor that keeps such a GPU busy for a while, in units of what a test of rules needs.
int gpu_scale();

// Copies that this program has asked for so far.
std::uint64_t gpu_copies();

// Kernels that this program has launched so far. Only of virtual GPUs.
std::uint64_t gpu_launches();

// The next call of this name returns this error (cudaError_t) and does nothing. Only of virtual GPUs.
void fail_next(const std::string& call, int error);

// What was done wrong since the last time, where the GPU tells it otherwise than by errors of calls.
std::vector<std::string> take_gpu_reports();

}  // namespace distill::test
