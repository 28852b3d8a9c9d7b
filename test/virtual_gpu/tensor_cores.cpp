// What a warp does with tensor cores: products of fragments, and loading them from shared memory.
#include <cstring>

#include "core/number.h"
#include "virtual_gpu/device.h"
#include "virtual_gpu/internal.h"

namespace virtual_gpu {

namespace {

template <class T>
float number(std::uint16_t bits) {
  T x;
  x.bits = bits;
  return static_cast<float>(x);
}

// D += A B of one warp. Each lane has left its registers of A and B and keeps its own of D.
template <class T>
void multiply(float* d, const Left* left) {
  const auto element = [&](int holder, int r, int k) {
    std::uint16_t bits;
    std::memcpy(&bits, left[holder].bytes + 4 * r + 2 * (k % 2), sizeof bits);
    return number<T>(bits);
  };
  const int g = lane / 4, i = lane % 4;
  float rows[2][16], columns[2][16];  // of A: g and g + 8; of B: 2i and 2i + 1
  for (int k = 0; k < 16; ++k) {
    const int holder = k % 8 / 2, right = k / 8;
    for (int n = 0; n < 2; ++n) {
      rows[n][k] = element(4 * g + holder, 2 * right + n, k);
      columns[n][k] = element(4 * (2 * i + n) + holder, 4 + right, k);
    }
  }
  for (int output = 0; output < 4; ++output) {
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += rows[output / 2][k] * columns[output % 2][k];
    d[output] += sum;
  }
}

}  // namespace

void mma_m16n8k16(float* d, const std::uint32_t* a, const std::uint32_t* b, Half format, Site site) {
  const Unobserved unobserved;
  const std::uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const Left* left = warp_meet(0xffffffffu, "mma", mine, sizeof mine, Orders::nothing, site);
  if (format == Half::bf16)
    multiply<distill::bf16>(d, left);
  else
    multiply<distill::f16>(d, left);
}

void ldmatrix(std::uint32_t* r, int matrices, bool transposed, const void* row, Site site) {
  const Unobserved unobserved;
  const Left* left = warp_meet(0xffffffffu, "ldmatrix", &row, sizeof row, Orders::nothing, site);
  const int g = lane / 4, i = lane % 4;
  for (int m = 0; m < matrices; ++m) {
    std::uint16_t pair[2];
    for (int half = 0; half < 2; ++half) {
      const int from = transposed ? 2 * i + half : g, element = transposed ? g : 2 * i + half;
      const auto* address = from_bytes<const std::uint16_t*>(left[8 * m + from].bytes);
      if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0)
        fault("misaligned address", join("a row of ldmatrix at ", site.file, ":", site.line));
      races_access(address + element, sizeof *address, false, __builtin_return_address(0));
      pair[half] = address[element];
    }
    r[m] = pair[0] | std::uint32_t{pair[1]} << 16;
  }
}

}  // namespace virtual_gpu
