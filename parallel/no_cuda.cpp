// Stands for what needs the CUDA runtime where the toolkit was not found.
#include "parallel/parallel.h"

namespace distill {

std::unique_ptr<TeacherSource> open_gpu_source(Communicator&, int, const ChannelShape&, Device&,
                                               std::string& obstacle) {
  obstacle = "this program was built without CUDA";
  return nullptr;
}
std::unique_ptr<LogitsSink> open_gpu_sink(Communicator&, int, const ChannelShape&, Device&, std::string& obstacle) {
  obstacle = "this program was built without CUDA";
  return nullptr;
}

}  // namespace distill
