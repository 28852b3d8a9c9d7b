// `distill inspect`: what a checkpoint holds, and whether every byte of it is good.
#pragma once

#include <string>

#include "apps/run_plan.h"
#include "core/error.h"

namespace distill {

// `path`: a checkpoint, a folder of them, or a run's folder. Says what is there and what is wrong with it; bad_input
// where anything is. `each_tensor`: not only a summary of them.
ExitCode inspect(const std::string& path, bool each_tensor, const Say& say);

}  // namespace distill
