// A Team is a group of lanes that share a row: lane() of lanes(), and reductions whose result every lane gets.
// One lane on the CPU (Lone), a block on CUDA, real threads in tests.
#pragma once

#include "core/number.h"

namespace distill {

struct Lone {
  DISTILL_HD int lane() const { return 0; }
  DISTILL_HD int lanes() const { return 1; }
  template <class T>
  DISTILL_HD T sum(T x) const {
    return x;
  }
  template <class T>
  DISTILL_HD T max(T x) const {
    return x;
  }
};

}  // namespace distill
