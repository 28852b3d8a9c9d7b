// Which device each rank of a run computes on.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/communicator.h"
#include "core/config.h"
#include "core/device.h"
#include "kernels/gpus.h"
#include "parallel/grid.h"

namespace distill {

// What one rank sees, for choose_gpus.
struct RankSight {
  int node = 0;
  Gpus gpus;
};

// By rank: the number of its GPU among those that it sees; empty when the run computes on CPUs. A pure function.
// device_mapping counts the GPUs of all nodes one after the other and says which the i-th rank of the role has. Without
// it the ranks of a node that see the same GPUs take one each, or, where those are too few, a student and its teacher
// share one, unless it is exclusive. device `auto` means GPUs where every rank can have one. Too few, or none with
// `cuda`, is an input error.
std::vector<int> choose_gpus(const Config& config, const Grid& grid, const std::vector<RankSight>& sights);

// The devices of the ranks of a run.
struct RunDevices {
  std::vector<int> gpus;          // choose_gpus
  std::vector<RankSight> sights;  // by rank; empty where nobody had to look

  bool are_gpus() const { return !gpus.empty(); }
};
// All ranks of world call it, with a grid of them; what is wrong is a CommonError.
RunDevices find_devices(const Config& config, const Grid& grid, Communicator& world);

// "device: cpu", or a table of ranks and their GPUs.
std::string describe(const RunDevices& devices, const Grid& grid, const Communicator& world);

// Whether this rank asks for the GPU library's attention (attn_implementation: sdpa): by the model of its role, or by
// either where it plays both.
bool wants_library_attention(const Config& config, const Place& place);

// This rank's device; `threads`: of a CPU. Why the library's attention cannot be used is a warning of the first rank of
// a role.
std::unique_ptr<Device> make_device(const RunDevices& devices, const Config& config, const Grid& grid, int rank,
                                    int threads);

// The groups in which tensors of a device travel, made of those that work in host memory.
void move_to_device(Groups& groups, Device& device, const RunDevices& devices);

}  // namespace distill
