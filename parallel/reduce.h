// The one place where values of several ranks are added: in rank order, whatever the transport.
#pragma once

#include <cstdint>
#include <span>

#include "core/communicator.h"

namespace distill {

// out[i] = parts[0][i] op parts[1][i] op …, in this order, rounded once. out may be one of the parts.
void reduce_in_order(void* out, std::span<const void* const> parts, std::int64_t count, DType dtype, Reduce op);

}  // namespace distill
