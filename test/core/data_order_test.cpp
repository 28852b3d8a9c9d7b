#include "core/train/data_order.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <numeric>
#include <set>

using namespace distill;
using Indices = std::vector<std::int32_t>;

TEST_CASE("the order of an epoch is the documented permutation", "[data_order]") {
  // From an independent implementation with Python's integers.
  CHECK(epoch_order(10, 42, 0, true) == Indices{1, 0, 3, 9, 4, 7, 6, 8, 5, 2});
  CHECK(epoch_order(10, 42, 1, true) == Indices{3, 2, 1, 6, 0, 5, 7, 9, 4, 8});
  CHECK(epoch_order(10, 7, 0, true) == Indices{5, 3, 1, 8, 7, 9, 6, 0, 4, 2});
  const Indices thousand = epoch_order(1000, 42, 3, true);
  CHECK(Indices(thousand.begin(), thousand.begin() + 5) == Indices{674, 245, 87, 682, 619});
}

TEST_CASE("an epoch holds every sample once", "[data_order]") {
  const int samples = GENERATE(0, 1, 2, 3, 64, 1001);
  Indices order = epoch_order(samples, 5, GENERATE(0, 1, 1000000), true);
  std::sort(order.begin(), order.end());
  Indices expected(static_cast<std::size_t>(samples));
  std::iota(expected.begin(), expected.end(), 0);
  CHECK(order == expected);
}

TEST_CASE("without shuffling the order is that of the file", "[data_order]") {
  CHECK(epoch_order(4, 42, 9, false) == Indices{0, 1, 2, 3});
}

TEST_CASE("shuffling is uniform", "[data_order]") {
  // How often sample i comes to place j in 6,000 epochs of 6: expectation 1,000, standard deviation 29.
  int count[6][6] = {};
  for (int epoch = 0; epoch < 6000; ++epoch) {
    const Indices order = epoch_order(6, 1, epoch, true);
    for (int j = 0; j < 6; ++j) ++count[order[std::size_t(j)]][j];
  }
  for (const auto& row : count)
    for (const int n : row) CHECK(std::abs(n - 1000) < 150);
}

TEST_CASE("a step's samples depend on its number alone", "[data_order]") {
  const DataOrder order(23, 4, LastBatch::drop, 42, true);
  REQUIRE(order.steps_per_epoch() == 5);
  std::vector<Indices> forward;
  for (int step = 0; step < 15; ++step) forward.push_back(order.step_samples(step));
  const DataOrder fresh(23, 4, LastBatch::drop, 42, true);
  for (const int step : {14, 3, 9, 0, 5, 4}) CHECK(fresh.step_samples(step) == forward[std::size_t(step)]);

  for (int epoch = 0; epoch < 3; ++epoch) {
    const Indices whole = epoch_order(23, 42, epoch, true);
    Indices joined;
    for (int s = 0; s < 5; ++s) {
      const Indices& part = forward[std::size_t(epoch * 5 + s)];
      joined.insert(joined.end(), part.begin(), part.end());
    }
    CHECK(joined == Indices(whole.begin(), whole.begin() + 20));  // the last 3 are dropped
  }
}

TEST_CASE("the last batch of an epoch is dropped or kept", "[data_order]") {
  CHECK(DataOrder(8, 4, LastBatch::drop, 0, false).steps_per_epoch() == 2);
  CHECK(DataOrder(11, 4, LastBatch::drop, 0, false).steps_per_epoch() == 2);
  CHECK(DataOrder(3, 4, LastBatch::drop, 0, false).steps_per_epoch() == 0);
  const DataOrder kept(11, 4, LastBatch::keep, 0, false);
  CHECK(kept.steps_per_epoch() == 3);
  CHECK(kept.step_samples(2) == Indices{8, 9, 10});
  CHECK(kept.step_samples(3) == Indices{0, 1, 2, 3});
}

TEST_CASE("the cut of a step covers it once and does not depend on the number of ranks", "[data_order]") {
  Indices step(24);
  std::iota(step.begin(), step.end(), 100);
  std::vector<std::set<Indices>> blocks_of_grid;
  for (const int dp_size : {1, 2, 3, 4, 6, 12}) {
    const BatchShape shape{.per_device = 2, .accumulation = 12 / dp_size, .dp_size = dp_size};
    REQUIRE(shape.global() == 24);
    std::set<Indices> blocks;
    Indices all;
    for (int m = 0; m < shape.accumulation; ++m)
      for (int rank = 0; rank < dp_size; ++rank) {
        const auto block = shape.cut(step, m, rank);
        REQUIRE(block.size() == 2);
        blocks.insert(Indices(block.begin(), block.end()));
        all.insert(all.end(), block.begin(), block.end());
      }
    CHECK(all == step);
    blocks_of_grid.push_back(blocks);
  }
  for (const auto& blocks : blocks_of_grid) CHECK(blocks == blocks_of_grid.front());
}

TEST_CASE("the cut of a last, incomplete step gives each sample once", "[data_order]") {
  const BatchShape shape{.per_device = 3, .accumulation = 1, .dp_size = 4};
  const Indices step = {0, 1, 2, 3, 4, 5, 6};
  Indices all;
  for (int rank = 0; rank < 4; ++rank) {
    const auto block = shape.cut(step, 0, rank);
    all.insert(all.end(), block.begin(), block.end());
  }
  CHECK(all == step);
  CHECK(shape.cut(step, 0, 2).size() == 1);
  CHECK(shape.cut(step, 0, 3).empty());
}

TEST_CASE("impossible cuts and steps are refused", "[data_order]") {
  const BatchShape shape{.per_device = 1, .accumulation = 2, .dp_size = 3};
  CHECK_THROWS_WITH(shape.cut({}, 2, 0), "micro-batch 2 of 2, dp rank 0 of 3");
  CHECK_THROWS_WITH(shape.cut({}, 0, 3), "micro-batch 0 of 2, dp rank 3 of 3");
  CHECK_THROWS_WITH(DataOrder(3, 0, LastBatch::drop, 0, true), "a global batch of 0 sequences");
  CHECK_THROWS_WITH(DataOrder(3, 4, LastBatch::drop, 0, true).step_samples(0), "step 0 of data with 0 steps an epoch");
  CHECK_THROWS_WITH(DataOrder(3, 1, LastBatch::drop, 0, true).step_samples(-1),
                    "step -1 of data with 3 steps an epoch");
}
