// Stands for nccl_group.cpp where NCCL was not found.
#include <utility>

#include "core/group_on_device.h"
#include "parallel/parallel.h"

namespace distill {

std::unique_ptr<Communicator> make_gpu_group(Device& device, std::unique_ptr<Communicator> host, GpuTraffic) {
  return std::make_unique<StagedGroup>(device, std::move(host));
}

}  // namespace distill
