#include "apps/version.h"

#include "apps/command_line.h"
#include "core/error.h"
#include "io/libraries.h"
#include "kernels/backends.h"
#include "parallel/parallel.h"

namespace distill {

std::string version_text() {
  return text("distill ", DISTILL_VERSION, "\n", "backends: cpu (", cpu_backend_version(), "); ",
              cuda_backend_version(), "\n", "mpi: ", MpiSession::library_version(), "\n",
              "libraries: ", command_line_library_version(), ", ", io_library_versions(), "\n");
}

}  // namespace distill
