// What `distill --version` prints.
#pragma once

#include <string>

namespace distill {

// Version, backends, MPI and libraries, a line each.
std::string version_text();

}  // namespace distill
