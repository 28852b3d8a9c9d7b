// The backends. Concrete classes stay in their folders.
#pragma once

#include <memory>
#include <string>

#include "core/device.h"

namespace distill {

// The host's processor with this many compute threads.
std::unique_ptr<Device> make_cpu_device(int threads);
// Libraries and their versions, for --version.
std::string cpu_backend_version();

}  // namespace distill
