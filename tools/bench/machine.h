// What a GPU machine is and how fast it copies without our kernels. cuda_machine.cpp asks the CUDA runtime,
// no_cuda_machine.cpp stands for it where there is no toolkit.
#pragma once

#include <cstddef>
#include <string>

#include "core/device.h"

namespace distill::bench {

// Versions, GPUs and which of them reach each other, a line each. An input error
// where no GPU can be used.
//   driver: CUDA 13.0, runtime: CUDA 13.0
//   gpu 0: NVIDIA H100 80GB HBM3, 81559 MiB, compute capability 9.0, 132 multiprocessors, 0000:1B:00.0,
//     any number of processes (compute mode 0)
//   peer access 0 -> 1: yes
std::string machine_text();

// Memory of the host that a GPU copies from directly.
Buffer pinned_memory(std::size_t bytes);
// Puts a copy within device memory, or from pinned memory into it, on the device's stream.
void copy_within(Device& device, void* to, const void* from, std::size_t bytes);
void copy_to_device(Device& device, void* to, const void* from, std::size_t bytes);

}  // namespace distill::bench
