// What stands for the CUDA backend in a build without the toolkit.
#include <catch2/catch.hpp>

#include "kernels/backends.h"
#include "test/support/refusal.h"

namespace distill {
namespace {

TEST_CASE("a program without CUDA says so", "[cuda]") {
  CHECK(cuda_backend_version() == "built without CUDA");
  CHECK(test::refusal("", [] { make_cuda_device(0); }) ==
        "this program was built without CUDA: build it where the CUDA toolkit is installed");
}

}  // namespace
}  // namespace distill
