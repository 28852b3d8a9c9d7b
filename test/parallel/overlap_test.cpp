// What runs while a training step computes: gradient sums behind the backward, activations and their gradients between
// stages. Ranks are threads and the computing is plain loops, so that ThreadSanitizer sees every access.
#include <catch2/catch.hpp>

#include "core/train/gradient_sync.h"
#include "core/train/pipeline.h"
#include "parallel/grid.h"
#include "parallel/parallel.h"
#include "test/support/tiny_models.h"

using namespace distill;
using namespace distill::test;

namespace {

View flat(std::vector<float>& x) { return {x.data(), 1, std::int64_t(x.size()), DType::f32}; }

// Of a rank, small whole numbers: every sum is exact.
float gradient(int tp_rank, int dp_rank, int round, std::int64_t i) {
  return float((i * 7 + tp_rank * 3 + dp_rank * 5 + round) % 64);
}
float updated(int round, std::int64_t i) { return float((i * 11 + round) % 1024); }

// Data-parallel steps on a tp 2 x dp 2 grid with sequence parallel, whose norms are summed over tp as well.
void train_in_parallel(Communicator& world, bool shards, bool overlaps) {
  constexpr int size = 2;
  const Grid grid = make_grid(nodes_of(world), size, 1, false);
  const Groups groups = make_groups(world, grid, /*kv_sharers=*/1);
  const Place& me = grid.places[std::size_t(world.rank())];
  const ModelSpec spec = wide_spec("qwen2", true);
  const ModelPart part{.tp_size = size,
                       .tp_rank = me.tp_rank,
                       .first_layer = 0,
                       .end_layer = spec.layers,
                       .cuts_tokens = true,
                       .vocabulary = vocabulary_part(37, spec.vocabulary, size, me.tp_rank)};
  const ParamTable table = param_table(spec, part, size);
  std::vector<float> values(std::size_t(table.storage_size())), gradients(values.size());
  GradientSync sync(table, flat(values), flat(gradients), {*groups.dp, *groups.tp}, shards, overlaps);
  for (int round = 0; round < 3; ++round) {
    for (std::size_t b = table.buckets().size(); b-- > 0;) {  // the backward; what was begun is under way meanwhile
      const Range bucket = table.buckets()[b];
      for (const Param& p : table.all())
        if (p.offset >= bucket.begin && p.offset < bucket.end())
          for (std::int64_t i = 0; i < p.size(); ++i)
            gradients[std::size_t(p.offset + i)] = gradient(me.tp_rank, me.dp_rank, round, i);
      sync.bucket_ready(b);
    }
    sync.finish();
    for (const Range& owned : sync.owned())
      for (const Param& p : table.all())
        for (std::int64_t i = std::max<std::int64_t>(0, owned.begin - p.offset);
             i < std::min(p.size(), owned.end() - p.offset); ++i) {
          float sum = 0;
          for (int dp = 0; dp < size; ++dp)
            for (int tp = 0; tp < size; ++tp)
              if (p.is_partial || tp == me.tp_rank) sum += gradient(tp, dp, round, i);
          const std::size_t at = std::size_t(p.offset + i);
          check(gradients[at] == sum, p.name, " ", i, ": ", gradients[at], " instead of ", sum);
          values[at] = updated(round, i);
        }
    sync.share_values();
    for (const Param& p : table.all())
      for (std::int64_t i = 0; i < p.size(); ++i)
        check(values[std::size_t(p.offset + i)] == updated(round, i), p.name, " ", i, " after the update");
  }
}

// Micro-batches through the stages of a pipeline and back, as a step of the trainer, with the memory that a model keeps
// for it: every stage adds 1 on the way forward and doubles on the way back.
void run_pipeline(Communicator& forward, Communicator& backward, int micros) {
  PipelineLinks links(forward, backward);
  const int stages = links.stages(), stage = links.stage(), slots = most_in_flight(stages, stage, micros);
  constexpr std::int64_t n = 3000;
  const std::vector<float> empty(n);
  std::vector<std::vector<float>> in(static_cast<std::size_t>(slots + 1), empty), out(in), to_previous(2, empty);
  std::vector<float> from_next = empty;
  const auto input = [&](int m) -> std::vector<float>& { return in[std::size_t(m % (slots + 1))]; };
  const auto output = [&](int m) -> std::vector<float>& { return out[std::size_t(m % slots)]; };
  const auto value = [](int m, std::int64_t i) { return float((m * 100 + i) % 500); };
  links.expect_input(flat(input(0)));
  for (const PipelineTask& task : one_f_one_b(stages, stage, micros)) {
    const int m = task.micro;
    if (task.kind == PipelineTask::Kind::forward) {
      links.receive_input();
      if (m + 1 < micros) links.expect_input(flat(input(m + 1)));
      for (std::int64_t i = 0; i < n; ++i)
        output(m)[std::size_t(i)] = (links.is_first() ? value(m, i) : input(m)[std::size_t(i)]) + 1;
      links.send_output(flat(output(m)), std::size_t(slots));
      continue;
    }
    if (m == 0) links.expect_gradient(flat(from_next));
    links.receive_gradient();
    for (std::int64_t i = 0; i < n; ++i) {
      const float expected = value(m, i) + float(stages), of_output = output(m)[std::size_t(i)];
      const float received = links.is_last() ? of_output : from_next[std::size_t(i)];
      check(of_output == value(m, i) + float(stage + 1), "output ", i, " of micro-batch ", m, ": ", of_output);
      check(received == expected * float(1 << (stages - 1 - stage)), "gradient ", i, " of micro-batch ", m, ": ",
            received);
      to_previous[std::size_t(m % 2)][std::size_t(i)] = 2 * received;
    }
    links.send_gradient(flat(to_previous[std::size_t(m % 2)]), 1);
    if (m + 1 < micros) links.expect_gradient(flat(from_next));
  }
  links.finish();
}

}  // namespace

TEST_CASE("gradient sums that run behind the backward are the sums of all ranks") {
  const bool shards = GENERATE(true, false), overlaps = GENERATE(true, false);
  run_ranks(4, [&](Communicator& world) { train_in_parallel(world, shards, overlaps); });
}

TEST_CASE("stages of a pipeline exchange micro-batches while they compute") {
  const int stages = GENERATE(1, 2, 4), micros = GENERATE(1, 3, 9);
  run_ranks(stages, [&](Communicator& world) {
    const auto backward = world.split(0, world.rank(), "backward");
    for (int step = 0; step < 3; ++step) run_pipeline(world, *backward, micros);
  });
}
