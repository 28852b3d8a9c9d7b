#include "io/convert.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "core/error.h"

namespace distill {

namespace {

constexpr std::size_t worth_a_thread = 1 << 18;  // elements; below, starting one costs more than it saves
constexpr std::size_t most_threads = 8;          // memory gives no more

// Calls part(first, count) for consecutive parts of [0, n), each in a thread of its own.
template <class Part>
void in_parts(std::size_t n, const Part& part) {
  const std::size_t threads = std::clamp<std::size_t>(
      n / worth_a_thread, 1,
      std::clamp(std::size_t(std::thread::hardware_concurrency()), std::size_t(1), most_threads));
  std::vector<std::jthread> others;
  const auto first = [&](std::size_t i) { return n * i / threads; };
  for (std::size_t i = 1; i < threads; ++i)
    others.emplace_back([&part, begin = first(i), count = first(i + 1) - first(i)] { part(begin, count); });
  part(0, first(1));
}

// Without branches, so that the loop over it becomes vector code; the same values as float(f16).
float widened_f16(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  const std::uint32_t rebiased = (magnitude << 13) + (112u << 23);
  const std::uint32_t finite = magnitude >= 0x7c00u ? rebiased + (112u << 23) : rebiased;
  const auto subnormal = std::bit_cast<std::uint32_t>(float(std::int32_t(magnitude)) * 0x1p-24f);
  return std::bit_cast<float>(sign | (magnitude < 0x400u ? subnormal : finite));
}

float widened_bf16(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t(bits) << 16); }

template <class Convert>
void widen_each(float* to, const std::byte* from, std::size_t n, const Convert& convert) {
  for (std::size_t i = 0; i < n; ++i) {
    std::uint16_t bits = 0;
    std::memcpy(&bits, from + i * sizeof bits, sizeof bits);
    to[i] = convert(bits);
  }
}

}  // namespace

void widen(std::span<float> to, DType type, const void* from) {
  check(type == DType::f32 || type == DType::bf16 || type == DType::f16, "cannot widen ", name_of(type));
  const auto* bytes = static_cast<const std::byte*>(from);
  in_parts(to.size(), [&](std::size_t first, std::size_t n) {
    const std::byte* source = bytes + first * size_of(type);
    float* target = to.data() + first;
    if (type == DType::f32)
      std::memcpy(target, source, n * sizeof(float));
    else if (type == DType::bf16)
      widen_each(target, source, n, widened_bf16);
    else
      widen_each(target, source, n, widened_f16);
  });
}

void narrow(void* to, DType type, std::span<const float> from) {
  check(type == DType::f32 || type == DType::bf16 || type == DType::f16, "cannot narrow to ", name_of(type));
  in_parts(from.size(), [&](std::size_t first, std::size_t n) {
    const float* source = from.data() + first;
    if (type == DType::f32)
      std::memcpy(static_cast<float*>(to) + first, source, n * sizeof(float));
    else if (type == DType::bf16)
      std::transform(source, source + n, static_cast<bf16*>(to) + first, [](float x) { return bf16(x); });
    else
      std::transform(source, source + n, static_cast<f16*>(to) + first, [](float x) { return f16(x); });
  });
}

}  // namespace distill
