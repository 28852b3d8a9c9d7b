// The schedule of a pipeline played for all sizes in one process, and how a model is cut for a grid.
#include "core/train/pipeline.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <map>
#include <set>
#include <tuple>

#include "core/model/params.h"
#include "test/support/tiny_models.h"

using namespace distill;
using namespace distill::test;

namespace {

using Kind = PipelineTask::Kind;

// Plays all stages, each doing its next task as soon as what it needs is there; true when all come to their end.
bool completes(int stages, int micros) {
  std::vector<std::vector<PipelineTask>> tasks;
  std::vector<std::size_t> next(std::size_t(stages), 0);
  std::set<std::tuple<Kind, int, int>> done;  // kind, stage, micro
  for (int s = 0; s < stages; ++s) tasks.push_back(one_f_one_b(stages, s, micros));
  for (bool moved = true; moved;) {
    moved = false;
    for (int s = 0; s < stages; ++s) {
      auto& at = next[std::size_t(s)];
      if (at == tasks[std::size_t(s)].size()) continue;
      const PipelineTask task = tasks[std::size_t(s)][at];
      const bool is_forward = task.kind == Kind::forward;
      const int from = is_forward ? s - 1 : s + 1;
      const bool own = is_forward || done.contains({Kind::forward, s, task.micro});
      if (!own || (from >= 0 && from < stages && !done.contains({task.kind, from, task.micro}))) continue;
      done.insert({task.kind, s, task.micro});
      ++at;
      moved = true;
    }
  }
  return done.size() == std::size_t(2 * stages * micros);
}

}  // namespace

TEST_CASE("one forward, one backward never sticks and holds few micro-batches", "[pipeline]") {
  for (int stages = 1; stages <= 8; ++stages)
    for (int micros = 0; micros <= 12; ++micros) {
      CAPTURE(stages, micros);
      CHECK(completes(stages, micros));
      for (int stage = 0; stage < stages; ++stage) {
        int in_flight = 0, most = 0, next_forward = 0, next_backward = 0;
        for (const PipelineTask& task : one_f_one_b(stages, stage, micros)) {
          const bool is_forward = task.kind == Kind::forward;
          CHECK(task.micro == (is_forward ? next_forward++ : next_backward++));
          in_flight += is_forward ? 1 : -1;
          most = std::max(most, in_flight);
        }
        CHECK(std::max(most, 1) == most_in_flight(stages, stage, micros));
      }
    }
}

TEST_CASE("the schedule of three stages and four micro-batches", "[pipeline]") {
  const auto text_of = [](const std::vector<PipelineTask>& tasks) {
    std::string out;
    for (const PipelineTask& t : tasks) out += text(t.kind == Kind::forward ? "F" : "B", t.micro, " ");
    return out;
  };
  CHECK(text_of(one_f_one_b(3, 0, 4)) == "F0 F1 F2 B0 F3 B1 B2 B3 ");
  CHECK(text_of(one_f_one_b(3, 1, 4)) == "F0 F1 B0 F2 B1 F3 B2 B3 ");
  CHECK(text_of(one_f_one_b(3, 2, 4)) == "F0 B0 F1 B1 F2 B2 F3 B3 ");
}

TEST_CASE("the parts of a grid are the whole model, every element counted once", "[params]") {
  const std::string family = GENERATE("qwen2", "qwen3", "llama");
  const bool tied = GENERATE(true, false);
  const int tp = GENERATE(1, 2, 4), pp = GENERATE(1, 2, 3), dp = GENERATE(1, 3);
  CAPTURE(family, tied, tp, pp, dp);
  const ModelSpec spec = wide_spec(family, tied);
  const ParamTable whole = param_table(spec);
  std::map<std::string, std::vector<int>> counted;
  for (const Param& p : whole.all()) counted[p.name].assign(std::size_t(p.size()), 0);
  for (int stage = 0; stage < pp; ++stage)
    for (int rank = 0; rank < tp; ++rank) {
      const Range layers = stage_layers(spec.layers, pp, stage);
      const ModelPart part{.tp_size = tp,
                           .tp_rank = rank,
                           .first_layer = int(layers.begin),
                           .end_layer = int(layers.end()),
                           .has_embedding = stage == 0,
                           .has_head = stage == pp - 1,
                           .vocabulary = vocabulary_part(37, spec.vocabulary, tp, rank)};
      const ParamTable table = param_table(spec, part, dp);
      std::int64_t end = 0;
      for (const Range& bucket : table.buckets()) {
        CHECK(bucket.begin == end);
        CHECK(bucket.size % dp == 0);
        end = bucket.end();
      }
      CHECK(end == table.storage_size());
      for (const Param& p : table.all()) {
        const Param& in_whole = whole.all()[std::size_t(p.index)];
        CHECK(in_whole.name == p.name);
        CHECK(in_whole.rows == p.whole_rows);
        CHECK(in_whole.cols == p.whole_cols);
        CHECK(in_whole.decay == p.decay);
        if (p.is_copy || rank % p.sharers != 0) continue;
        for (std::int64_t r = 0; r < p.rows; ++r)
          for (std::int64_t c = 0; c < p.cols; ++c)
            ++counted[p.name][std::size_t((p.first_row + r) * p.whole_cols + p.first_col + c)];
      }
    }
  for (const auto& [name, counts] : counted) {
    CAPTURE(name);
    CHECK(std::all_of(counts.begin(), counts.end(), [](int n) { return n == 1; }));
  }
}

TEST_CASE("layers are cut as evenly as can be", "[params]") {
  for (int layers = 1; layers <= 20; ++layers)
    for (int stages = 1; stages <= layers; ++stages) {
      std::int64_t next = 0;
      for (int s = 0; s < stages; ++s) {
        const Range r = stage_layers(layers, stages, s);
        CHECK(r.begin == next);
        CHECK(r.size >= layers / stages);
        CHECK(r.size <= (layers + stages - 1) / stages);
        next = r.end();
      }
      CHECK(next == layers);
    }
}

TEST_CASE("vocabulary parts tile the real vocabulary, the same columns for student and teacher", "[params]") {
  for (const std::int64_t real : {5, 37, 4080, 151665})
    for (const int tp : {1, 2, 3, 4, 5, 8}) {
      CAPTURE(real, tp);
      if (real < tp) continue;
      std::int64_t next = 0, next_row = 0;
      for (int r = 0; r < tp; ++r) {
        const std::int64_t student_rows = real + 3, teacher_rows = real + 400;
        const VocabularyPart s = vocabulary_part(real, student_rows, tp, r),
                             t = vocabulary_part(real, teacher_rows, tp, r);
        CHECK(s.first == next_row);
        CHECK(s.first == t.first);
        const auto real_columns = [&](const VocabularyPart& p) {
          return std::clamp<std::int64_t>(real - p.first, 0, p.columns);
        };
        CHECK(real_columns(s) == real_columns(t));
        if (real >= tp * tp) CHECK(real_columns(s) > 0);
        CHECK(s.columns <= s.rows);
        next += real_columns(s);
        next_row += s.rows;
      }
      CHECK(next == real);
      CHECK(next_row == real + 3);
    }
}
