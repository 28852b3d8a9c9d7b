// The GPUs of this machine, before any of them is used.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace distill {

struct Gpu {
  std::string name;        // "NVIDIA H100 80GB HBM3"
  std::string bus_id;      // "0000:1B:00.0": two processes that see the same bus id see the same GPU
  std::size_t memory = 0;  // bytes
  bool exclusive = false;  // its compute mode: one process at a time
};

struct Gpus {
  std::vector<Gpu> visible;  // by the number that make_cuda_device takes
  std::string problem;       // why none can be used; empty when `visible` holds any
};

bool is_built_with_cuda();
// What the driver shows to this process. Never throws: a machine without GPUs is one of the answers.
Gpus find_gpus();

}  // namespace distill
