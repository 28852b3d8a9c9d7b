#include "parallel/reduce.h"

#include <algorithm>
#include <type_traits>

namespace distill {

namespace {

// NaN survives max and min.
template <Reduce op, class A>
A combine(A a, A b) {
  if constexpr (op == Reduce::sum) return a + b;
  if constexpr (op == Reduce::max) return b > a || b != b ? b : a;
  if constexpr (op == Reduce::min) return b < a || b != b ? b : a;
}

template <Reduce op, class T>
void reduce_blocks(T* out, std::span<const void* const> parts, std::int64_t count) {
  using A = std::conditional_t<std::is_integral_v<T>, std::int64_t, Compute<T>>;
  constexpr std::int64_t block = 1024;  // the accumulators stay in the first-level cache
  A sums[block];
  for (std::int64_t first = 0; first < count; first += block) {
    const std::int64_t n = std::min(block, count - first);
    const T* const x = static_cast<const T*>(parts[0]) + first;
    for (std::int64_t i = 0; i < n; ++i) sums[i] = A(x[i]);
    for (std::size_t p = 1; p < parts.size(); ++p) {
      const T* const y = static_cast<const T*>(parts[p]) + first;
      for (std::int64_t i = 0; i < n; ++i) sums[i] = combine<op>(sums[i], A(y[i]));
    }
    for (std::int64_t i = 0; i < n; ++i) out[first + i] = T(sums[i]);
  }
}

template <class T>
void reduce_typed(void* out, std::span<const void* const> parts, std::int64_t count, Reduce op) {
  T* const to = static_cast<T*>(out);
  switch (op) {
    case Reduce::sum:
      return reduce_blocks<Reduce::sum>(to, parts, count);
    case Reduce::max:
      return reduce_blocks<Reduce::max>(to, parts, count);
    case Reduce::min:
      return reduce_blocks<Reduce::min>(to, parts, count);
  }
}

}  // namespace

void reduce_in_order(void* out, std::span<const void* const> parts, std::int64_t count, DType dtype, Reduce op) {
  if (dtype == DType::i32) return reduce_typed<std::int32_t>(out, parts, count, op);
  with_float_type(dtype, [&]<class T>(T) { reduce_typed<T>(out, parts, count, op); });
}

}  // namespace distill
