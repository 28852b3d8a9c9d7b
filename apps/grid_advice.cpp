#include "apps/grid_advice.h"

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>

#include "core/error.h"
#include "parallel/grid.h"

namespace distill {

std::optional<Misfit> misfit(const ModelSpec& spec, int tp, int pp) {
  const auto tensor = [](auto... problem) { return Misfit{"tensor_model_parallel_size", text(problem...)}; };
  if (spec.q_heads % tp != 0) return tensor(spec.q_heads, " attention heads are no multiple of tp_size ", tp);
  if (spec.kv_heads % tp != 0 && tp % spec.kv_heads != 0)
    return tensor(spec.kv_heads, " key/value heads and tp_size ", tp, " do not divide each other");
  if (spec.feed_forward % tp != 0)
    return tensor("intermediate_size ", spec.feed_forward, " is no multiple of tp_size ", tp);
  if (spec.layers < pp)
    return Misfit{"pipeline_model_parallel_size", text(spec.layers, " layers are fewer than pp_size ", pp)};
  return {};
}

namespace {

constexpr std::size_t most_listed = 8;

std::vector<GridSizes> fitting_grids(const GridQuestion& question, const std::vector<int>& node_ranks) {
  const int ranks = std::accumulate(node_ranks.begin(), node_ranks.end(), 0);
  const int roles = question.has_teacher && ranks > 1 ? 2 : 1;  // one rank plays both
  std::vector<GridSizes> grids;
  for (int tp = 1; roles * tp <= ranks; ++tp)
    for (int pp = 1; roles * tp * pp <= ranks; ++pp) {
      const bool fits_nodes =
          ranks % (roles * tp * pp) == 0 &&
          std::all_of(node_ranks.begin(), node_ranks.end(), [&](int n) { return n % (roles * tp) == 0; });
      if (fits_nodes && std::all_of(question.models.begin(), question.models.end(),
                                    [&](const ModelSpec& model) { return !misfit(model, tp, pp); }))
        grids.push_back({tp, pp, ranks / (roles * tp * pp)});
    }
  std::stable_sort(grids.begin(), grids.end(), [&](const GridSizes& a, const GridSizes& b) {
    const auto likeness = [&](const GridSizes& g) { return (g.tp == question.tp) + (g.pp == question.pp); };
    return likeness(a) > likeness(b);
  });
  return grids;
}

// "6 ranks", "2 + 4 ranks on the nodes", "128 nodes × 8 + 1 node × 4 ranks".
std::string counts_text(const std::vector<int>& node_ranks) {
  constexpr std::size_t most_nodes = 4;
  if (node_ranks.size() == 1) return text(node_ranks[0], node_ranks[0] == 1 ? " rank" : " ranks");
  std::string out;
  const auto add = [&](auto... words) { out += text(out.empty() ? "" : " + ", words...); };
  if (node_ranks.size() <= most_nodes) {
    for (const int n : node_ranks) add(n);
    return out + " ranks on the nodes";
  }
  std::map<int, int, std::greater<>> nodes;  // by their ranks
  for (const int n : node_ranks) ++nodes[n];
  for (const auto& [n, count] : nodes) add(count, count == 1 ? " node × " : " nodes × ", n);
  return out + " ranks";
}

std::string list(const std::vector<GridSizes>& grids) {
  std::string out;
  for (std::size_t i = 0; i < std::min(grids.size(), most_listed); ++i)
    out += text(i > 0 ? ", " : "", grids[i].tp, "×", grids[i].pp, "×", grids[i].dp);
  return grids.size() > most_listed ? text(out, " and ", grids.size() - most_listed, " more") : out;
}

}  // namespace

std::string grid_advice(const GridQuestion& question) {
  const std::string what =
      text("(tp×pp×dp) that fit ", question.models.size() > 1 ? "these models" : "this model", " and ");
  if (const auto grids = fitting_grids(question, question.node_ranks); !grids.empty())
    return text("grids ", what, counts_text(question.node_ranks), ": ", list(grids));
  // Every even count has one.
  std::vector<int> fewer, more;
  for (const int n : question.node_ranks) {
    fewer.push_back(std::max(2, n / 2 * 2));
    more.push_back((n + 1) / 2 * 2);
  }
  std::string advice = text("no grid fits ", counts_text(question.node_ranks), ", which are halved; grids ", what);
  advice += text(counts_text(fewer), ": ", list(fitting_grids(question, fewer)));
  if (more != fewer) advice += text("; ", counts_text(more), ": ", list(fitting_grids(question, more)));
  return advice;
}

}  // namespace distill
