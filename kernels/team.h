// A Team is a group of lanes that share a row: lane() of lanes(), and reductions whose result every lane gets.
// One lane on the CPU (Lone), a block on CUDA, real threads in tests.
#pragma once

#include <cstdint>

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

// The elements 0 … n−1 of some rows, each by one lane: one after another unless the team has a way of its own. A row
// that is null reads as zeros. body(j, x[j]...).
template <class Team, class Body, class... T>
DISTILL_HD void for_elements(Team team, std::int64_t n, Body&& body, const T*... x) {
  if constexpr (requires { team.for_elements(n, body, x...); })
    team.for_elements(n, body, x...);
  else
    for (std::int64_t j = team.lane(); j < n; j += team.lanes()) body(j, (x ? x[j] : T{})...);
}
// to[j] = body(j, x[j]...); to may be one of the rows.
template <class Team, class To, class Body, class... T>
DISTILL_HD void write_elements(Team team, To* to, std::int64_t n, Body&& body, const T*... x) {
  if constexpr (requires { team.write_elements(to, n, body, x...); })
    team.write_elements(to, n, body, x...);
  else
    for (std::int64_t j = team.lane(); j < n; j += team.lanes()) to[j] = To(body(j, (x ? x[j] : T{})...));
}

}  // namespace distill
