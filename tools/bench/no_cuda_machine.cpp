#include "core/error.h"
#include "tools/bench/machine.h"

namespace distill::bench {

namespace {
[[noreturn]] void refuse() {
  fail_input("this program was built without CUDA: build it where the CUDA toolkit is installed");
}
}  // namespace

std::string machine_text() { refuse(); }
Buffer pinned_memory(std::size_t) { refuse(); }
void copy_within(Device&, void*, const void*, std::size_t) { refuse(); }
void copy_to_device(Device&, void*, const void*, std::size_t) { refuse(); }

}  // namespace distill::bench
