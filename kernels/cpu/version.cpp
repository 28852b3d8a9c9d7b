#include <dnnl.hpp>
#include <string>

#include "core/error.h"
#include "hwy/highway.h"
#include "kernels/backends.h"

namespace distill {

std::string cpu_backend_version() {
  const dnnl_version_t* v = dnnl_version();
  const std::int64_t targets = hwy::SupportedTargets();  // the lowest bit is the best of them
  return text("oneDNN ", v->major, ".", v->minor, ".", v->patch, ", Highway ", HWY_MAJOR, ".", HWY_MINOR, ".",
              HWY_PATCH, " for ", hwy::TargetName(targets & -targets));
}

}  // namespace distill
