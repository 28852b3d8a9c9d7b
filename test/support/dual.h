// Numbers a + b ε with ε² = 0: arithmetic on them carries exact first derivatives along.
#pragma once

#include <cmath>

namespace distill {

struct Dual {
  double v = 0, d = 0;  // value, derivative
  constexpr explicit Dual(double value = 0, double derivative = 0) : v(value), d(derivative) {}
};
inline Dual operator+(Dual x, Dual y) { return Dual(x.v + y.v, x.d + y.d); }
inline Dual operator-(Dual x, Dual y) { return Dual(x.v - y.v, x.d - y.d); }
inline Dual operator-(Dual x) { return Dual(-x.v, -x.d); }
inline Dual operator*(Dual x, Dual y) { return Dual(x.v * y.v, x.d * y.v + x.v * y.d); }
inline Dual operator/(Dual x, Dual y) { return Dual(x.v / y.v, (x.d - x.v / y.v * y.d) / y.v); }
inline bool operator>(Dual x, Dual y) { return x.v > y.v; }
inline Dual exp(Dual x) { return Dual(std::exp(x.v), std::exp(x.v) * x.d); }
inline Dual log(Dual x) { return Dual(std::log(x.v), x.d / x.v); }

}  // namespace distill
