// Number formats of files to float and back, in several threads, at the speed of memory.
#pragma once

#include <cstddef>
#include <span>

#include "core/number.h"

namespace distill {

// to[i] = element i of `from`, which holds to.size() elements of f32, bf16 or f16 and need not be aligned.
void widen(std::span<float> to, DType type, const void* from);
// Rounds to nearest even, as the types of core/number.h do. `to` must be aligned to its type.
void narrow(void* to, DType type, std::span<const float> from);

}  // namespace distill
