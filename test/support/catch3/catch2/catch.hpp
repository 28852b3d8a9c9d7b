// Catch2 3 under the name and with the spellings of Catch2 2.13, in which the tests are written. Only seen where version
// 3 is installed (test/CMakeLists.txt).
#pragma once

#include <catch2/catch_all.hpp>
#include <string>

using Catch::Approx;

namespace Catch {

using namespace Matchers;

// In version 3 Contains is about ranges.
inline auto Contains(const std::string& part) { return Matchers::ContainsSubstring(part); }

}  // namespace Catch
