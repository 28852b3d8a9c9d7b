// Counter-based random numbers: a value is a function of seed, tensor and index, so any cut of a tensor over ranks
// draws the same numbers. Nothing here has state.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

#include "core/number.h"

namespace distill {

// The output function of SplitMix64 (Steele, Lea & Flood 2014), a bijection of 64-bit words.
DISTILL_HD constexpr std::uint64_t mix_bits(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// What all values of one tensor share.
DISTILL_HD constexpr std::uint64_t random_key(std::uint64_t seed, std::uint64_t tensor) {
  return mix_bits(mix_bits(seed) ^ mix_bits(~tensor));
}

// Standard normal values number 2·pair and 2·pair + 1 (Box & Muller 1958): r cos φ and r sin φ with
// r = √(−2 ln u), φ = 2πv; u in (0, 1) and v in [0, 1) are the upper 53 bits of
// mix_bits(key + 2·pair) and mix_bits(key + 2·pair + 1), u with half a unit added.
struct NormalPair {
  double even, odd;
};
DISTILL_HD inline NormalPair normal_pair(std::uint64_t key, std::uint64_t pair) {
  const double u = (double(mix_bits(key + 2 * pair) >> 11) + 0.5) * 0x1p-53;
  const double v = double(mix_bits(key + 2 * pair + 1) >> 11) * 0x1p-53;
  const double radius = std::sqrt(-2 * std::log(u)), angle = 2 * std::numbers::pi * v;
  return {radius * std::cos(angle), radius * std::sin(angle)};
}

DISTILL_HD inline double normal_value(std::uint64_t key, std::uint64_t index) {
  const NormalPair pair = normal_pair(key, index / 2);
  return index % 2 == 0 ? pair.even : pair.odd;
}

}  // namespace distill
