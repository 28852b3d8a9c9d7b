// Stands for gpus.cpp where the toolkit was not found.
#include "kernels/gpus.h"

namespace distill {

bool is_built_with_cuda() { return false; }
Gpus find_gpus() { return {{}, "this program was built without CUDA"}; }

}  // namespace distill
