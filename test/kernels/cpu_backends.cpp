#include <hwy/targets.h>

#include "kernels/backends.h"
#include "test/support/backends.h"

namespace distill::test {
namespace {

// A CPU that knows no newer instructions than `targets` (Highway's name for them).
Backend old_cpu(const std::string& name, std::int64_t targets) {
  return {name, [=] {
            hwy::SetSupportedTargetsForTest(targets);
            return make_cpu_device(2);
          }};
}
Backend cpu(int threads) {
  return {"cpu", [=] {
            hwy::SetSupportedTargetsForTest(0);  // whatever this one has
            return make_cpu_device(threads);
          }};
}

}  // namespace

std::vector<Backend> backends() {
  std::vector<Backend> all = {cpu(1), cpu(3), old_cpu("cpu without vectors", HWY_STATIC_TARGET)};
  hwy::SetSupportedTargetsForTest(0);
  if (hwy::SupportedTargets() & HWY_AVX2) all.push_back(old_cpu("cpu with AVX2", HWY_AVX2));
  return all;
}

}  // namespace distill::test
