// The distances between student and teacher distributions, written as scalar functions of one vocabulary entry.
// To add one: an entry in Objective and objective_names (loss_spec.h) and a struct in divergence.inc; nothing else.
#pragma once

#include <cmath>
#include <string_view>
#include <tuple>
#include <utility>

#include "core/distill/loss_spec.h"
#include "core/number.h"

namespace distill {

// condition ? a : b, for numbers whose comparison gives a mask, too.
template <class S>
DISTILL_HD S select(bool condition, const S& a, const S& b) {
  return condition ? a : b;
}

#include "core/distill/divergence.inc"

namespace divergence_detail {
template <std::size_t... i>
constexpr bool names_agree(std::index_sequence<i...>) {
  return ((std::tuple_element_t<i, Divergences>::name == objective_names[i]) && ...);
}
}  // namespace divergence_detail
static_assert(std::tuple_size_v<Divergences> == objective_names.size() &&
                  divergence_detail::names_agree(std::make_index_sequence<objective_names.size()>{}),
              "Divergences and Objective name the same things in the same order");

// Calls body(divergence) with the one that spec.objective names, of the given list of them.
template <class List = Divergences, class Body>
void with_divergence(const LossSpec& spec, Body&& body) {
  const auto visit = [&]<std::size_t... i>(std::index_sequence<i...>) {
    (void)((int(spec.objective) == int(i) && (body(std::tuple_element_t<i, List>::of(spec)), true)) || ...);
  };
  visit(std::make_index_sequence<std::tuple_size_v<List>>{});
}

}  // namespace distill
