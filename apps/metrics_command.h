// distill metrics: looks at the metrics of a run, whether it has finished, goes on or was killed.
#pragma once

#include <string>

#include "apps/command_line.h"

namespace distill {

// What is printed; --svg writes its file.
std::string show_metrics(const CommandLine& line);

}  // namespace distill
