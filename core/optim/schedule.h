// Learning-rate schedules: the multiplier λ(k) of update k = 0, 1, …, as transformers.get_scheduler defines them.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <string_view>

namespace distill {

struct Schedule {
  std::string_view name;
  double (*factor)(std::int64_t k, std::int64_t warmup, std::int64_t total);
};

namespace schedules {

// Part of the warm-up that lies behind update k; 1 from its end on.
inline double ramp(std::int64_t k, std::int64_t warmup) {
  return k < warmup ? double(k) / double(std::max<std::int64_t>(1, warmup)) : 1.0;
}

// Part of the time after the warm-up that lies behind update k.
inline double progress(std::int64_t k, std::int64_t warmup, std::int64_t total) {
  return double(k - warmup) / double(std::max<std::int64_t>(1, total - warmup));
}

inline double constant(std::int64_t, std::int64_t, std::int64_t) { return 1; }
inline double constant_with_warmup(std::int64_t k, std::int64_t warmup, std::int64_t) { return ramp(k, warmup); }
inline double linear(std::int64_t k, std::int64_t warmup, std::int64_t total) {
  return k < warmup ? ramp(k, warmup)
                    : std::max(0.0, double(total - k) / double(std::max<std::int64_t>(1, total - warmup)));
}
// Half a cosine wave from 1 to 0.
inline double cosine(std::int64_t k, std::int64_t warmup, std::int64_t total) {
  return k < warmup ? ramp(k, warmup)
                    : std::max(0.0, 0.5 * (1 + std::cos(std::numbers::pi * progress(k, warmup, total))));
}

inline constexpr std::array<Schedule, 4> all = {
    {{"constant", constant}, {"constant_with_warmup", constant_with_warmup}, {"linear", linear}, {"cosine", cosine}}};

}  // namespace schedules
}  // namespace distill
