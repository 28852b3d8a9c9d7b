// CRC-32C (Castagnoli polynomial, as in iSCSI and ext4): the checksum of checkpoints.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace distill {

// The checksum of bytes that follow others whose checksum is `before`; 0 where they follow none.
std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t before = 0);
// The same without the processor's instruction for it.
std::uint32_t crc32c_by_table(std::span<const std::byte> bytes, std::uint32_t before = 0);

}  // namespace distill
