// Which grids work for given models and ranks, for messages about one that does not. Pure functions.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/model/spec.h"

namespace distill {

// Why a model cannot be cut so.
struct Misfit {
  std::string_view key;  // of strategy_config, that asks for it
  std::string problem;
};
// A vocabulary of tp² ids or more leaves no rank without a column.
std::optional<Misfit> misfit(const ModelSpec& spec, int tp, int pp);

// What to start: the models, with a teacher or without, and the ranks of each node.
struct GridQuestion {
  std::vector<ModelSpec> models;
  bool has_teacher = true;
  std::vector<int> node_ranks;
  int tp = 1, pp = 1;  // what was asked for: grids like it come first
};
// "grids (tp×pp×dp) that fit these models and 6 ranks: 1×1×3, 1×3×1". Where there is none, the same for the nearest
// counts that have one.
std::string grid_advice(const GridQuestion& question);

}  // namespace distill
