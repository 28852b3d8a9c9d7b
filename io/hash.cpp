#include "io/hash.h"

#include <xxhash.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <new>

namespace distill {

Hasher::Hasher() : state_(XXH3_createState()) {
  if (state_ == nullptr) throw std::bad_alloc();
  XXH3_128bits_reset(state_);
}

Hasher::~Hasher() { XXH3_freeState(state_); }

void Hasher::add(std::string_view piece) {
  const std::uint64_t size = piece.size();
  XXH3_128bits_update(state_, &size, sizeof size);
  XXH3_128bits_update(state_, piece.data(), piece.size());
}

std::string Hasher::hex() const {
  const XXH128_hash_t hash = XXH3_128bits_digest(state_);
  std::array<char, 33> digits{};
  std::snprintf(digits.data(), digits.size(), "%016llx%016llx", static_cast<unsigned long long>(hash.high64),
                static_cast<unsigned long long>(hash.low64));
  return digits.data();
}

}  // namespace distill
