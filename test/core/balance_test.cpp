#include "core/train/balance.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <limits>
#include <numeric>
#include <random>

#include "core/train/data_source.h"

using namespace distill;
using Ids = std::vector<std::int32_t>;
using Work = std::vector<std::int64_t>;

namespace {

// Lengths as real data has them: many short, few long.
Work random_work(std::size_t n, std::mt19937& random) {
  const SequenceWork work_of{std::int64_t(random() % 3000)};
  std::lognormal_distribution<double> lengths(5, 0.9);
  Work work;
  for (std::size_t i = 0; i < n; ++i)
    work.push_back(work_of(2 + std::min<std::int64_t>(2000, std::int64_t(lengths(random)))));
  return work;
}

Ids numbered(std::size_t n, std::int32_t first = 0) {
  Ids ids(n);
  std::iota(ids.begin(), ids.end(), first);
  return ids;
}

// Work of each cell of an order, m · dp_size + rank; samples are numbered from 100.
Work cells(const Ids& order, const Work& work, const BatchShape& shape) {
  Work sums;
  for (int m = 0; m < shape.accumulation; ++m)
    for (int rank = 0; rank < shape.dp_size; ++rank) {
      std::int64_t sum = 0;
      for (const std::int32_t i : shape.cut(order, m, rank)) sum += work[std::size_t(i - 100)];
      sums.push_back(sum);
    }
  return sums;
}

std::int64_t heaviest_rank(const Ids& order, const Work& work, const BatchShape& shape) {
  const Work sums = cells(order, work, shape);
  std::int64_t most = 0;
  for (int rank = 0; rank < shape.dp_size; ++rank) {
    std::int64_t sum = 0;
    for (int m = 0; m < shape.accumulation; ++m) sum += sums[std::size_t(m * shape.dp_size + rank)];
    most = std::max(most, sum);
  }
  return most;
}

// The least that the heaviest rank can have, by trying everything.
std::int64_t least_heaviest(const Work& work, std::size_t next, Work& sums, std::vector<int>& room) {
  if (next == work.size()) return *std::max_element(sums.begin(), sums.end());
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for (std::size_t rank = 0; rank < sums.size(); ++rank) {
    if (room[rank] == 0) continue;
    --room[rank];
    sums[rank] += work[next];
    least = std::min(least, least_heaviest(work, next + 1, sums, room));
    sums[rank] -= work[next];
    ++room[rank];
  }
  return least;
}

}  // namespace

TEST_CASE("balancing deals the same samples in cells of the same sizes, no rank heavier than the heaviest was",
          "[balance]") {
  std::mt19937 random(1);
  for (int round = 0; round < 300; ++round) {
    const BatchShape shape{
        .per_device = 1 + int(random() % 8), .accumulation = 1 + int(random() % 6), .dp_size = 1 + int(random() % 9)};
    // Every third step is incomplete, as the last one of a validation pass.
    const std::size_t n = round % 3 == 0 ? 1 + random() % std::size_t(shape.global()) : std::size_t(shape.global());
    const Work work = random_work(n, random);
    const Ids samples = numbered(n, 100), order = balanced_order(samples, work, shape);
    INFO(n << " sequences, " << shape.per_device << " x " << shape.accumulation << " x " << shape.dp_size);
    Ids sorted = order;
    std::sort(sorted.begin(), sorted.end());
    REQUIRE(sorted == samples);
    REQUIRE(heaviest_rank(order, work, shape) <= heaviest_rank(samples, work, shape));
    REQUIRE(order == balanced_order(samples, work, shape));
    const Ids again = balanced_order(
        order,
        [&] {
          Work reordered;
          for (const std::int32_t i : order) reordered.push_back(work[std::size_t(i - 100)]);
          return reordered;
        }(),
        shape);
    REQUIRE(heaviest_rank(again, work, shape) <= heaviest_rank(order, work, shape));
  }
}

TEST_CASE("the heaviest rank is near the best there is", "[balance]") {
  std::mt19937 random(2);
  double worst = 1, sum = 0;
  int cases = 0;
  for (const int dp_size : {2, 3, 4})
    for (int round = 0; round < 100; ++round) {
      const int per_rank = dp_size == 2 ? 1 + int(random() % 5) : 1 + int(random() % (dp_size == 3 ? 3 : 2));
      const BatchShape shape{.per_device = per_rank, .accumulation = 1, .dp_size = dp_size};
      const Work work = random_work(std::size_t(shape.global()), random);
      Work sums(std::size_t(dp_size), 0);
      std::vector<int> room(std::size_t(dp_size), per_rank);
      const auto best = double(least_heaviest(work, 0, sums, room));
      const double ratio =
          double(heaviest_rank(balanced_order(numbered(work.size(), 100), work, shape), work, shape)) / best;
      CHECK(ratio >= 1);
      worst = std::max(worst, ratio);
      sum += ratio;
      ++cases;
    }
  CHECK(worst < 1.25);
  CHECK(sum / cases < 1.02);
}

TEST_CASE("many sequences leave ranks even, and micro-batches nearly", "[balance]") {
  std::mt19937 random(3);
  const BatchShape shape{.per_device = 16, .accumulation = 4, .dp_size = 8};
  for (int round = 0; round < 20; ++round) {
    const Work work = random_work(std::size_t(shape.global()), random);
    const Ids order = balanced_order(numbered(work.size(), 100), work, shape);
    const auto total = double(std::accumulate(work.begin(), work.end(), std::int64_t{0}));
    CHECK(double(heaviest_rank(order, work, shape)) < 1.001 * total / shape.dp_size);
    // A cell with a very long sequence must hold fifteen others besides.
    const double least =
        std::max(total / (shape.dp_size * shape.accumulation), double(*std::max_element(work.begin(), work.end())));
    for (const std::int64_t cell : cells(order, work, shape)) CHECK(double(cell) < 1.25 * least);
  }
}

TEST_CASE("what is even already, or cannot be changed, stays as it is", "[balance]") {
  const Ids samples = numbered(6, 100);
  CHECK(balanced_order(samples, Work(6, 7), {.per_device = 1, .accumulation = 2, .dp_size = 3}) == samples);
  CHECK(balanced_order(samples, Work{1, 9, 2, 8, 5, 5}, {.per_device = 6, .accumulation = 1, .dp_size = 1}) == samples);
  CHECK(balanced_order(Ids{}, Work{}, {.per_device = 2, .accumulation = 2, .dp_size = 2}).empty());
  CHECK_THROWS_WITH(balanced_order(samples, Work(5, 1), {}), "work of 5 sequences, there are 6");
}

TEST_CASE("one long sequence among short ones has its rank to itself as far as sizes allow", "[balance]") {
  // Two ranks, two sequences each: 10 goes with the smallest.
  const BatchShape shape{.per_device = 2, .accumulation = 1, .dp_size = 2};
  CHECK(balanced_order(Ids{4, 5, 6, 7}, Work{10, 4, 3, 1}, shape) == Ids{4, 7, 5, 6});
}

TEST_CASE("a balanced source teaches the same samples in a step", "[balance]") {
  std::mt19937 random(4);
  SampleBuilder builder;
  for (int i = 0; i < 100; ++i) builder.add(Ids(std::size_t(2 + random() % 90), i), 1);
  const Samples samples = std::move(builder).finish();
  const auto step_of = [&](bool balances, std::int64_t step) {
    std::pair<Ids, std::int64_t> seen;  // samples, tokens of the largest rank
    for (int rank = 0; rank < 4; ++rank) {
      DataPlan plan;
      plan.shape = {.per_device = 3, .accumulation = 2, .dp_size = 4};
      plan.dp_rank = rank;
      if (balances) plan.balance = SequenceWork{.per_token = 1000};
      const EncodedDataSource source(samples, plan);
      std::int64_t tokens = 0;
      for (const MicroBatch& micro : source.step(step).micro) {
        CHECK(micro.offsets.size() == 4);
        CHECK(std::int64_t(micro.tokens.size()) <= source.most_tokens());
        CHECK(std::int64_t(micro.supervised.size()) <= source.most_supervised());
        for (std::size_t s = 0; s < 3; ++s) seen.first.push_back(micro.tokens[std::size_t(micro.offsets[s])]);
        tokens += micro.real_tokens;
      }
      seen.second = std::max(seen.second, tokens);
    }
    std::sort(seen.first.begin(), seen.first.end());
    return seen;
  };
  for (const std::int64_t step : {0, 1, 5, 17}) {
    const auto plain = step_of(false, step), balanced = step_of(true, step);
    CHECK(plain.first == balanced.first);
    CHECK(plain.second >= balanced.second);
  }
}
