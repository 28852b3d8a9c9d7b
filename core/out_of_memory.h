// Memory that a device does not have: which, for what, and how much. The user can cause it, and mend it.
#pragma once

#include <string>
#include <string_view>

#include "core/error.h"

namespace distill {

// What Device::allocate throws. The message says how much was asked for and what is free.
class OutOfMemory final : public Error {
 public:
  explicit OutOfMemory(const std::string& message) : Error(ExitCode::bad_input, message) {}
};

// Runs work; a message about memory that it wants in vain begins with what it wants it for.
template <class Work>
decltype(auto) with_memory_for(std::string_view purpose, const Work& work) {
  try {
    return work();
  } catch (const OutOfMemory& error) {
    throw OutOfMemory(text(purpose, ": ", error.what()));
  }
}

}  // namespace distill
