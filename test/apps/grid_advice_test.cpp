// Which grids a message offers: exactly those that the program accepts.
#include "apps/grid_advice.h"

#include <catch2/catch.hpp>

#include "parallel/grid.h"
#include "test/support/tiny_models.h"

using namespace distill;
using namespace distill::test;
using Catch::Matchers::Contains;

namespace {

ModelSpec model(int q_heads, int kv_heads, int layers, int feed_forward = 48) {
  ModelSpec spec = tiny_spec("qwen2", true);
  spec.q_heads = q_heads;
  spec.kv_heads = kv_heads;
  spec.layers = layers;
  spec.feed_forward = feed_forward;
  return spec;
}

}  // namespace

TEST_CASE("grids that fit are listed, those like the one asked for first") {
  CHECK(grid_advice({{model(4, 2, 2), model(4, 2, 4)}, true, {8}, 4, 2}) ==
        "grids (tp×pp×dp) that fit these models and 8 ranks: 1×2×2, 2×2×1, 4×1×1, 1×1×4, 2×1×2");
  CHECK(grid_advice({{model(6, 3, 1)}, false, {6}, 1, 1}) ==
        "grids (tp×pp×dp) that fit this model and 6 ranks: 1×1×6, 3×1×2, 6×1×1");
  // A group of tensor-parallel ranks stays on a node, a pipeline need not.
  CHECK(grid_advice({{model(8, 8, 4)}, true, {2, 2}, 2, 1}) ==
        "grids (tp×pp×dp) that fit this model and 2 + 2 ranks on the nodes: 1×1×2, 1×2×1");
  CHECK_THAT(grid_advice({{model(64, 64, 64, 64)}, true, {128}, 1, 1}),
             Contains(": 1×1×64, 1×2×32,") && Contains(" and 20 more"));
}

TEST_CASE("where no grid fits, the nearest counts that have one are named") {
  CHECK(grid_advice({{model(4, 2, 2)}, true, {3}, 1, 1}) ==
        "no grid fits 3 ranks, which are halved; grids (tp×pp×dp) that fit this model and 2 ranks: 1×1×1; "
        "4 ranks: 1×1×2, 1×2×1, 2×1×1");
  CHECK(grid_advice({{model(4, 2, 1)}, true, {1, 3}, 1, 1}) ==
        "no grid fits 1 + 3 ranks on the nodes, which are halved; grids (tp×pp×dp) that fit this model and "
        "2 + 2 ranks on the nodes: 1×1×2; 2 + 4 ranks on the nodes: 1×1×3");
  CHECK(grid_advice({{model(4, 2, 1)}, true, {1}, 2, 1}) == "grids (tp×pp×dp) that fit this model and 1 rank: 1×1×1");
}

TEST_CASE("many nodes are counted by their ranks") {
  std::vector<int> nodes(128, 8);
  CHECK_THAT(grid_advice({{model(8, 8, 1)}, true, nodes, 8, 1}), Contains(" and 128 nodes × 8 ranks: "));
  nodes[3] = 4;
  CHECK_THAT(grid_advice({{model(8, 8, 1)}, true, nodes, 8, 1}), Contains(" and 127 nodes × 8 + 1 node × 4 ranks: "));
  nodes[5] = 3;
  CHECK_THAT(grid_advice({{model(8, 8, 1)}, true, nodes, 8, 1}),
             Contains("no grid fits 126 nodes × 8 + 1 node × 4 + 1 node × 3 ranks, ") &&
                 Contains(" and 126 nodes × 8 + 1 node × 4 + 1 node × 2 ranks: ") &&
                 Contains("; 126 nodes × 8 + 2 nodes × 4 ranks: "));
}

TEST_CASE("what is offered is what can be made") {
  const ModelSpec spec = model(8, 2, 5);
  for (const bool has_teacher : {true, false})
    for (const std::vector<int>& node_ranks :
         std::vector<std::vector<int>>{{1}, {2}, {4}, {6}, {12}, {16}, {2, 2}, {4, 8}, {2, 6, 4}}) {
      std::vector<int> nodes;
      for (std::size_t n = 0; n < node_ranks.size(); ++n) nodes.insert(nodes.end(), std::size_t(node_ranks[n]), int(n));
      for (int tp = 1; tp <= 8; ++tp)
        for (int pp = 1; pp <= 8; ++pp) {
          CAPTURE(has_teacher, node_ranks, tp, pp);
          bool is_possible = !misfit(spec, tp, pp);
          std::string sizes;
          try {
            sizes = text(' ', tp, "×", pp, "×", make_grid(nodes, tp, pp, has_teacher).sizes.dp);
          } catch (const Error&) {
            is_possible = false;
          }
          const std::string advice = grid_advice({{spec}, has_teacher, node_ranks, tp, pp}) + ",";
          // What was asked for comes first.
          if (is_possible)
            CHECK_THAT(advice, Contains(":" + sizes + ","));
          else
            CHECK_THAT(advice, !Contains(text(' ', tp, "×", pp, "×")));
        }
    }
}
