#include "core/train/micro_batch.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <map>

#include "core/error.h"
#include "core/train/data_source.h"

using namespace distill;
using Ids = std::vector<std::int32_t>;

namespace {

// Sample i has 1 + (5 i mod 7) tokens more than its prompt; ids are unique: 100 i + position.
Samples make_samples(int count, bool on_prompt = false) {
  SampleBuilder samples;
  for (int i = 0; i < count; ++i) {
    const int prompt = 1 + i % 4, length = prompt + 1 + 5 * i % 7;
    Ids tokens;
    for (int t = 0; t < length; ++t) tokens.push_back(100 * i + t);
    samples.add(tokens, on_prompt ? 0 : prompt);
  }
  return std::move(samples).finish();
}

// What a micro-batch teaches: (token at the position, label), both unique in make_samples().
std::vector<std::pair<int, int>> lessons(const MicroBatch& batch) {
  std::vector<std::pair<int, int>> pairs;
  for (std::size_t c = 0; c < batch.supervised.size(); ++c)
    pairs.emplace_back(batch.tokens[std::size_t(batch.supervised[c])], batch.labels[c]);
  return pairs;
}

DataPlan training_plan(int per_device, int accumulation, int dp_size, int dp_rank = 0) {
  DataPlan plan;
  plan.shape = {.per_device = per_device, .accumulation = accumulation, .dp_size = dp_size};
  plan.dp_rank = dp_rank;
  return plan;
}

}  // namespace

TEST_CASE("the supervised positions of a sample", "[micro_batch]") {
  const Ids tokens = {5, 6, 7, 8};
  const auto count = [&](int prompt) { return SampleView{tokens, prompt}.supervised(); };
  CHECK(count(0) == 3);  // distill_on_prompt: n − 1
  CHECK(count(1) == 3);
  CHECK(count(2) == 2);
  CHECK(count(3) == 1);  // only the last token is labelled; the position before it is supervised
  CHECK(count(4) == 0);
  CHECK(count(9) == 0);
  CHECK(SampleView{}.supervised() == 0);
}

TEST_CASE("a packed micro-batch, by hand", "[micro_batch]") {
  SampleBuilder builder;
  builder.add(Ids{10, 11, 12}, 1);
  builder.add(Ids{20, 21}, 2);  // nothing to supervise
  builder.add(Ids{30, 31, 32, 33}, 3);
  const Samples samples = std::move(builder).finish();
  const MicroBatch batch = assemble(samples, Ids{2, 0, 1}, Layout::packed);
  CHECK(batch.tokens == Ids{30, 31, 32, 33, 10, 11, 12, 20, 21});
  CHECK(batch.positions == Ids{0, 1, 2, 3, 0, 1, 2, 0, 1});
  CHECK(batch.offsets == Ids{0, 4, 7, 9});
  CHECK(batch.supervised == Ids{2, 4, 5});
  CHECK(batch.labels == Ids{33, 11, 12});
  CHECK(batch.longest == 4);
  CHECK(batch.real_tokens == 9);
}

TEST_CASE("a padded micro-batch, by hand", "[micro_batch]") {
  SampleBuilder builder;
  builder.add(Ids{10, 11, 12}, 1);
  builder.add(Ids{20}, 0);
  const Samples samples = std::move(builder).finish();
  const MicroBatch batch = assemble(samples, Ids{1, 0}, Layout::padded);
  CHECK(batch.tokens == Ids{20, 0, 0, 10, 11, 12});
  CHECK(batch.positions == Ids{0, 1, 2, 0, 1, 2});
  CHECK(batch.offsets == Ids{0, 3, 6});
  CHECK(batch.supervised == Ids{3, 4});
  CHECK(batch.labels == Ids{11, 12});
  CHECK(batch.longest == 3);
  CHECK(batch.real_tokens == 4);
}

TEST_CASE("packed and padded teach the same", "[micro_batch]") {
  const Samples samples = make_samples(9, GENERATE(false, true));
  const Ids indices = {3, 8, 0, 5, 6};
  const MicroBatch packed = assemble(samples, indices, Layout::packed),
                   padded = assemble(samples, indices, Layout::padded);
  CHECK(lessons(packed) == lessons(padded));
  CHECK(packed.real_tokens == padded.real_tokens);
  CHECK(packed.longest == padded.longest);
  CHECK(std::int64_t(packed.tokens.size()) == packed.real_tokens);
  CHECK(padded.tokens.size() == indices.size() * std::size_t(padded.longest));
}

TEST_CASE("a micro-batch of no samples is empty", "[micro_batch]") {
  const MicroBatch batch = assemble(make_samples(3), Ids{}, GENERATE(Layout::packed, Layout::padded));
  CHECK(batch.tokens.empty());
  CHECK(batch.offsets == Ids{0});
  CHECK(batch.longest == 0);
}

TEST_CASE("what a step teaches does not depend on the number of ranks", "[data_source]") {
  const Samples samples = make_samples(50);
  const auto lessons_of = [&](int accumulation, int dp_size, std::int64_t step) {
    std::vector<std::pair<int, int>> all;
    std::int64_t tokens = 0;
    StepBatch last;
    for (int rank = 0; rank < dp_size; ++rank) {
      const EncodedDataSource source(samples, training_plan(2, accumulation, dp_size, rank));
      last = source.step(step);
      REQUIRE(int(last.micro.size()) == accumulation);
      for (const MicroBatch& micro : last.micro) {
        for (const auto& pair : lessons(micro)) all.push_back(pair);
        tokens += micro.real_tokens;
      }
    }
    CHECK(last.global_supervised == std::int64_t(all.size()));
    CHECK(last.global_tokens == tokens);
    CHECK(last.global_samples == 2 * accumulation * dp_size);
    std::sort(all.begin(), all.end());
    return all;
  };
  for (const std::int64_t step : {0, 3, 4, 11}) {
    const auto one_rank = lessons_of(6, 1, step);
    CHECK(lessons_of(3, 2, step) == one_rank);
    CHECK(lessons_of(2, 3, step) == one_rank);
    CHECK(lessons_of(1, 6, step) == one_rank);
  }
}

TEST_CASE("a source counts epochs and drops the incomplete batch", "[data_source]") {
  const EncodedDataSource source(make_samples(11), training_plan(2, 2, 1));
  CHECK(source.steps_per_epoch() == 2);
  CHECK(source.step(0).epoch == 0.5);
  CHECK(source.step(1).epoch == 1);
  CHECK(source.step(4).epoch == 2.5);
}

TEST_CASE("no micro-batch exceeds the bounds, and some reaches them", "[data_source]") {
  const Layout layout = GENERATE(Layout::packed, Layout::padded);
  const int per_device = GENERATE(1, 2, 3);
  DataPlan plan = training_plan(per_device, 1, 1);
  plan.layout = layout;
  const EncodedDataSource source(make_samples(6), plan);
  std::int64_t tokens = 0, supervised = 0;
  for (int step = 0; step < 200; ++step) {
    const MicroBatch micro = source.step(step).micro.at(0);
    tokens = std::max(tokens, std::int64_t(micro.tokens.size()));
    supervised = std::max(supervised, std::int64_t(micro.supervised.size()));
  }
  CHECK(tokens == source.most_tokens());
  CHECK(supervised == source.most_supervised());
}

TEST_CASE("validation sees every sample exactly once, on any number of ranks", "[data_source]") {
  const Samples samples = make_samples(11);
  const int dp_size = GENERATE(1, 2, 3), batch_size = GENERATE(1, 2, 4, 16);
  std::map<int, int> seen;  // first token of a sequence → how often
  for (int rank = 0; rank < dp_size; ++rank) {
    const EncodedDataSource source(samples, validation_plan(batch_size, dp_size, rank, Layout::packed));
    REQUIRE(source.steps_per_epoch() == (11 + batch_size * dp_size - 1) / (batch_size * dp_size));
    for (std::int64_t step = 0; step < source.steps_per_epoch(); ++step)
      for (const MicroBatch& micro : source.step(step).micro) {
        CHECK(std::int64_t(micro.tokens.size()) <= source.most_tokens());
        for (std::size_t s = 0; s + 1 < micro.offsets.size(); ++s) ++seen[micro.tokens[std::size_t(micro.offsets[s])]];
      }
  }
  CHECK(seen.size() == 11);
  for (const auto& [token, times] : seen) CHECK(times == 1);
}

TEST_CASE("too little data is an input error that says how much is needed", "[data_source]") {
  CHECK_THROWS_WITH(EncodedDataSource(Samples{}, training_plan(1, 1, 1)),
                    "the data has 0 usable records, fewer than one global batch of 1 = per_device_train_batch_size 1 x "
                    "gradient_accumulation_steps 1 x 1 data-parallel ranks");
  CHECK_THROWS_WITH(
      EncodedDataSource(make_samples(11), training_plan(2, 3, 2)),
      "the data has 11 usable records, fewer than one global batch of 12 = per_device_train_batch_size 2 x "
      "gradient_accumulation_steps 3 x 2 data-parallel ranks");
  try {
    EncodedDataSource(Samples{}, training_plan(1, 1, 1));
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::bad_input);
  }
}
