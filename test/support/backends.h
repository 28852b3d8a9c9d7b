// What the conformance suite runs over: every program of it links one file that defines backends().
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/device.h"

namespace distill::test {

struct Backend {
  std::string name;
  std::function<std::shared_ptr<Device>()> make;
};
std::vector<Backend> backends();

}  // namespace distill::test
