// The specification of parallelism: training on any grid is training on one rank. Ranks are threads; every last stage
// has a teacher of its own, cut over the same tensor-parallel group. Tag [full] is every combination, run by hand.
#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <random>
#include <set>

#include "core/train/teacher.h"
#include "core/train/trainer.h"
#include "kernels/backends.h"
#include "parallel/grid.h"
#include "parallel/parallel.h"
#include "test/support/tiny_models.h"

using namespace distill;
using namespace distill::test;

namespace {

constexpr int real_vocabulary = 37, global_batch = 8, longest = 12;
constexpr std::int64_t steps = 10;
constexpr double learning_rate = 2e-3;

struct Setup {
  // What is trained: must not change with the grid.
  std::string family = "qwen2";
  bool tied = true;
  Objective objective = Objective::forward_kl;
  int topk = 0;
  DType dtype = DType::f32;
  // How.
  int tp = 1, pp = 1, dp = 1;
  bool cuts_tokens = false;
  Layout layout = Layout::packed;
  Recompute recompute = Recompute::none;
  bool shards = true, overlaps = true;
  int accumulation = 0;  // 0: micro-batches of two sequences
  bool balances = false;
  // What, too: the student's shape.
  int q_heads = 8, kv_heads = 2, layers = 5, hidden = 24, feed_forward = 40;
  double epsilon = 1e-8;  // AdamW's

  int micro_batches() const { return accumulation > 0 ? accumulation : global_batch / dp / 2; }
  std::string what() const {
    return text(family, tied ? " tied " : " untied ", objective_names[std::size_t(objective)], " top-", topk, ' ',
                name_of(dtype), " heads ", q_heads, '/', kv_heads, " layers ", layers, " hidden ", hidden, '/',
                feed_forward, " epsilon ", epsilon);
  }
  ModelSpec student() const {
    ModelSpec s = wide_spec(family, tied);
    s.q_heads = q_heads;
    s.kv_heads = kv_heads;
    s.layers = layers;
    s.hidden = hidden;
    s.feed_forward = feed_forward;
    return s;
  }
};

std::ostream& operator<<(std::ostream& out, const Setup& s) {
  return out << s.what() << ", tp " << s.tp << (s.cuts_tokens ? " with sequence parallel" : "") << " pp " << s.pp
             << " dp " << s.dp << (s.layout == Layout::padded ? ", padded" : "") << ", recompute " << int(s.recompute)
             << (s.balances ? ", balanced" : "") << (s.shards ? "" : ", whole optimiser")
             << (s.overlaps ? "" : ", no overlap") << ", " << s.micro_batches() << " micro-batches";
}

// Whole parameters by name, put together from the parts of all ranks.
using Whole = std::map<std::string, std::vector<float>>;

struct Outcome {
  std::vector<double> losses, norms, validation;  // of validation all four metrics
  std::vector<double> teacher_waits, student_waits, bubbles;
  StepTimes times;
  Whole gradients, weights;    // of the first step; at the end
  std::int64_t differing = 0;  // weights of which two ranks hold different bits, at the end
};

// Elements `range` of a rank's flat storage into the whole; returns how many of them another rank had put there with
// other bits.
std::int64_t put(Whole& whole, Device& device, const Param& p, const Range& range, const View& flat) {
  Tensor wide = device.tensor(1, range.size, DType::f32);
  device.cast(wide.view(), flat.col_slice(range.begin, range.size));
  const auto values = download<float>(device, wide.view());
  std::vector<float>& to = whole[p.name];
  to.resize(std::size_t(p.whole_rows * p.whole_cols), std::numeric_limits<float>::quiet_NaN());
  std::int64_t differing = 0;
  for (std::int64_t i = 0; i < range.size; ++i) {
    const std::int64_t at = range.begin - p.offset + i;
    float& value = to[std::size_t((p.first_row + at / p.cols) * p.whole_cols + p.first_col + at % p.cols)];
    const float mine = values[std::size_t(i)];
    differing += !std::isnan(value) && std::memcmp(&value, &mine, sizeof mine) != 0;
    value = mine;
  }
  return differing;
}

// The logits of a teacher, which takes a known time.
constexpr double teacher_wait = 0.25, student_wait = 0.5;  // seconds a micro-batch
class ClockedTeacher final : public TeacherSource {
 public:
  ClockedTeacher(Device& device, Teacher& teacher, DType dtype, std::int64_t chunk)
      : teacher_(device, teacher, dtype, chunk) {}
  void begin(const MicroBatch& batch) override {
    teacher_.begin(batch);
    ++batches_;
  }
  ConstView acquire(std::int64_t positions) override { return teacher_.acquire(positions); }
  void release() override { teacher_.release(); }
  double seconds_waited() const override { return batches_ * teacher_wait; }
  double teacher_seconds_waited() const override { return batches_ * student_wait; }

 private:
  LocalTeacher teacher_;
  int batches_ = 0;
};

ModelPlace place_of(const ModelSpec& spec, const Setup& s, const Place& place, Communicator& tp, Range layers) {
  return {.part = {.tp_size = s.tp,
                   .tp_rank = place.tp_rank,
                   .first_layer = int(layers.begin),
                   .end_layer = int(layers.end()),
                   .has_embedding = layers.begin == 0,
                   .has_head = layers.end() == spec.layers,
                   .cuts_tokens = s.cuts_tokens,
                   .vocabulary = vocabulary_part(real_vocabulary, spec.vocabulary, s.tp, place.tp_rank)},
          .tp = &tp,
          .bucket_parts = s.dp};
}

class Rank {
 public:
  Rank(const Setup& setup, Communicator& world, Outcome& outcome, std::mutex& mutex)
      : s_(setup),
        grid_(make_grid(nodes_of(world), s_.tp, s_.pp, false)),
        me_(grid_.places[std::size_t(world.rank())]),
        spec_(s_.student()),
        groups_(make_groups(world, grid_, kv_sharers(spec_, s_.tp))),
        outcome_(outcome),
        mutex_(mutex) {}

  void run() {
    const int row_multiple = s_.cuts_tokens ? s_.tp : 1;
    const EncodedDataSource data(random_samples(96, real_vocabulary, 1),
                                 {.shape = {global_batch / s_.dp / s_.micro_batches(), s_.micro_batches(), s_.dp},
                                  .dp_rank = me_.dp_rank,
                                  .layout = s_.layout,
                                  .row_multiple = row_multiple,
                                  .balance = s_.balances ? std::optional(SequenceWork{.per_token = 3}) : std::nullopt});
    const EncodedDataSource validation(random_samples(7, real_vocabulary, 2),
                                       validation_plan(2, s_.dp, me_.dp_rank, s_.layout, row_multiple));
    Transformer::Limits limits{.tokens = std::max(data.most_tokens(), validation.most_tokens()),
                               .supervised = std::max(data.most_supervised(), validation.most_supervised()),
                               .longest = longest,
                               .trains = true,
                               .recompute = s_.recompute,
                               .in_flight = most_in_flight(s_.pp, me_.pp_rank, s_.micro_batches())};
    Transformer student(*device_, spec_, s_.dtype, limits,
                        place_of(spec_, s_, me_, *groups_.tp, stage_layers(spec_.layers, s_.pp, me_.pp_rank)));
    randomise(*device_, student, 1, 0.1f);
    GradientSync sync(student.table(), student.values(), student.gradients(),
                      {*groups_.dp, *groups_.tp, groups_.kv.get(), s_.tied ? groups_.tied.get() : nullptr}, s_.shards,
                      s_.overlaps);
    Optimizer optimizer(*device_, student.table(), student.values(),
                        {.epsilon = s_.epsilon, .weight_decay = 0.1, .max_grad_norm = 1},
                        {sync.owned(), s_.shards || me_.dp_rank == 0, me_.tp_rank});

    std::optional<Transformer> teacher_model;
    std::optional<Teacher> teacher;
    std::optional<ClockedTeacher> source;
    if (me_.pp_rank + 1 == s_.pp) {
      const ModelSpec spec = wide_spec("qwen3", false);
      limits.trains = false;
      limits.in_flight = 1;
      teacher_model.emplace(*device_, spec, s_.dtype, limits, place_of(spec, s_, me_, *groups_.tp, {0, spec.layers}));
      randomise(*device_, *teacher_model, 2);
      teacher.emplace(*device_, *teacher_model, real_vocabulary, limits.tokens, limits.supervised);
      source.emplace(*device_, *teacher, s_.dtype, 5);
    }
    Trainer trainer(
        *device_, student, optimizer, sync, source ? &*source : nullptr, data, &validation,
        {*groups_.role, *groups_.dp, *groups_.pp_forward, *groups_.pp_backward}, options(),
        {.report = [&](const MetricRecord& r) { take(r, student, optimizer); }, .save = {}, .stop_requested = {}});
    TrainState state;
    trainer.run(state);
    const std::lock_guard lock(mutex_);
    if (groups_.role->rank() == 0) outcome_.times = trainer.times();
    for (const Param& p : student.table().all())
      outcome_.differing += put(outcome_.weights, *device_, p, {p.offset, p.size()}, student.values());
  }

 private:
  TrainerOptions options() const {
    TrainerOptions o;
    o.total_steps = steps;
    o.eval_steps = 5;
    o.save_steps = 0;
    o.learning_rate = learning_rate;
    o.schedule = schedules::constant;
    o.loss.objective = s_.objective;
    o.loss.topk = s_.topk;
    o.loss.topk_mode = TopkMode::tail;
    o.loss.vocabulary = real_vocabulary;
    o.logits_chunk = 5;
    o.micro_batches = s_.micro_batches();
    return o;
  }

  void take(const MetricRecord& record, Transformer& student, const Optimizer& optimizer) {
    const std::lock_guard lock(mutex_);
    if (record.step == 1)
      for (const Optimizer::Piece& p : optimizer.pieces())
        if (p.counts) put(outcome_.gradients, *device_, *p.param, p.range, student.gradients());
    if (groups_.role->rank() != 0) return;
    for (const auto& [name, value] : record.values) {
      if (name == "train/loss") outcome_.losses.push_back(value);
      if (name == "student/grad_norm") outcome_.norms.push_back(value);
      if (name.starts_with("student/val_")) outcome_.validation.push_back(value);
      if (name == "time/teacher_wait") outcome_.teacher_waits.push_back(value);
      if (name == "time/student_wait") outcome_.student_waits.push_back(value);
      if (name == "system/pipeline_bubble") outcome_.bubbles.push_back(value);
    }
  }

  const Setup& s_;
  std::unique_ptr<Device> device_ = make_cpu_device(1);
  Grid grid_;
  Place me_;
  ModelSpec spec_;
  Groups groups_;
  Outcome& outcome_;
  std::mutex& mutex_;
};

Outcome train(const Setup& setup) {
  Outcome outcome;
  std::mutex mutex;
  run_ranks(setup.tp * setup.pp * setup.dp, [&](Communicator& world) { Rank(setup, world, outcome, mutex).run(); });
  return outcome;
}

const Outcome& on_one_rank(const Setup& setup) {
  static std::map<std::string, Outcome> known;
  const auto found = known.find(setup.what());
  if (found != known.end()) return found->second;
  Setup one;
  one.family = setup.family;
  one.tied = setup.tied;
  one.objective = setup.objective;
  one.topk = setup.topk;
  one.dtype = setup.dtype;
  one.q_heads = setup.q_heads;
  one.kv_heads = setup.kv_heads;
  one.layers = setup.layers;
  one.hidden = setup.hidden;
  one.feed_forward = setup.feed_forward;
  one.epsilon = setup.epsilon;
  return known.emplace(setup.what(), train(one)).first->second;
}

double norm(const std::vector<float>& x) {
  double sum = 0;
  for (const float v : x) sum += double(v) * v;
  return std::sqrt(sum);
}

// Design section 10: loss and gradient norm to 1e-5, gradients of step 1 to 1e-5 of their tensor's norm, weights to
// 1e-2 Σ lr elementwise and 1e-5 in norm. 16-bit formats: to their rounding.
void check_equal(const Setup& setup) {
  CAPTURE(setup);
  const Outcome &one = on_one_rank(setup), grid = train(setup);
  const double tolerance = setup.dtype == DType::f32 ? 1e-5 : 2e-2;
  REQUIRE(grid.losses.size() == one.losses.size());
  REQUIRE(one.validation.size() == 4 * steps / 5);
  REQUIRE(grid.validation.size() == one.validation.size());
  for (std::size_t i = 0; i < one.losses.size(); ++i) {
    CAPTURE(i);
    CHECK(grid.losses[i] == Approx(one.losses[i]).epsilon(tolerance));
    CHECK(grid.norms[i] == Approx(one.norms[i]).epsilon(setup.dtype == DType::f32 ? tolerance : 1e-1));
  }
  for (std::size_t i = 0; i < one.validation.size(); ++i)
    CHECK(grid.validation[i] == Approx(one.validation[i]).epsilon(tolerance));
  REQUIRE(grid.gradients.size() == one.gradients.size());
  CHECK(grid.differing == 0);
  if (setup.dtype != DType::f32) return;
  double squares = 0, off = 0, largest = 0;
  for (const auto& [name, expected] : one.weights) {
    CAPTURE(name);
    const std::vector<float>&found = grid.weights.at(name), &gradient = one.gradients.at(name);
    std::vector<float> difference = grid.gradients.at(name);
    REQUIRE(difference.size() == gradient.size());
    REQUIRE(found.size() == expected.size());
    for (std::size_t i = 0; i < difference.size(); ++i) difference[i] -= gradient[i];
    CHECK(norm(difference) <= 1e-5 * norm(gradient));
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const double d = double(found[i]) - expected[i];
      off += d * d;
      squares += double(expected[i]) * expected[i];
      largest = std::max(largest, std::abs(d));
    }
  }
  CHECK(largest <= 1e-2 * learning_rate * steps);
  CHECK(std::sqrt(off) <= 1e-5 * std::sqrt(squares));
}

Setup random_setup(std::mt19937& random, int most_ranks) {
  const auto one_of = [&](auto... values) {
    const std::array all{values...};
    return all[random() % all.size()];
  };
  Setup s;
  do {
    s.tp = one_of(1, 2, 4);
    s.pp = one_of(1, 2, 3, 4, 5);
    s.dp = one_of(1, 2, 4);
  } while (s.tp * s.pp * s.dp > most_ranks);
  s.family = one_of("qwen2", "qwen3", "llama", "mistral");
  s.q_heads = one_of(4, 8, 12);
  s.kv_heads = one_of(1, 2, 4);
  s.layers = one_of(5, 6, 7);
  s.hidden = one_of(12, 20, 28);
  s.feed_forward = 4 * one_of(3, 7, 10);
  // Where a gradient is nearly 0, AdamW makes its rounding a step of the whole rate; in some of these shapes that is
  // more than 1e-5 of the loss after ten steps, on one rank with another cut of the batch as well.
  s.epsilon = 1e-4;
  s.tied = one_of(true, false);
  s.objective = Objective(random() % objective_names.size());
  s.topk = one_of(0, 0, 3, 30);
  s.cuts_tokens = one_of(true, false);
  s.layout = one_of(Layout::packed, Layout::padded);
  s.recompute = one_of(Recompute::none, Recompute::full, Recompute::selective);
  s.shards = one_of(true, false);
  s.overlaps = one_of(true, false);
  s.balances = one_of(true, false);
  s.accumulation = one_of(1, 2) * (s.dp == 1 ? one_of(1, 4) : 1);
  return s;
}

}  // namespace

namespace {

// A run for every pair of values of two properties (the test below sees to that), and two large ones; tag [full] has
// all combinations. What else there is to choose varies along.
std::vector<Setup> cover() {
  constexpr auto none = Recompute::none, full = Recompute::full, selective = Recompute::selective;
  constexpr auto packed = Layout::packed, padded = Layout::padded;
  constexpr auto fkl = Objective::forward_kl, rkl = Objective::reverse_kl, adaptive = Objective::adaptive_kl,
                 js = Objective::js_divergence, sfkl = Objective::skewed_forward_kl,
                 srkl = Objective::skewed_reverse_kl;
  constexpr auto f32 = DType::f32;
  constexpr bool balanced = true;
  return {{"qwen2", true, fkl, 0, f32, 1, 1, 1, false, packed, selective, false, true, 2},
          {"qwen3", true, rkl, 0, f32, 2, 1, 1, true, packed, full, true, false, 0, balanced},
          {"mistral", false, srkl, 0, f32, 1, 1, 2, false, padded, full, true, true, 0},
          {"llama", false, js, 0, f32, 2, 1, 1, true, packed, none, false, false, 1},
          {"mistral", false, srkl, 0, f32, 1, 2, 1, false, packed, selective, true, true, 0, balanced},
          {"qwen2", true, sfkl, 0, f32, 1, 4, 2, false, packed, none, false, false, 0, balanced},
          {"qwen3", false, rkl, 0, f32, 2, 4, 1, true, padded, selective, true, true, 0},
          {"qwen2", false, fkl, 6, f32, 2, 2, 2, true, packed, full, true, true, 0},
          {"qwen2", true, adaptive, 0, f32, 2, 2, 1, false, padded, none, true, false, 2},
          {"qwen3", true, adaptive, 6, f32, 4, 1, 2, true, packed, selective, true, false, 1, balanced},
          {"llama", false, js, 0, f32, 4, 2, 1, false, padded, none, false, true, 0},
          {"qwen3", false, rkl, 0, f32, 4, 4, 1, true, packed, full, false, true, 0},
          {"qwen2", true, adaptive, 0, f32, 4, 2, 2, true, packed, none, true, true, 0},
          {"qwen2", true, sfkl, 0, f32, 2, 4, 2, true, padded, selective, true, true, 0}};
}

enum class Packing { none, balanced, padded };

// What must be covered, each property by the number of its value.
using Levels = std::array<int, 9>;
Levels levels(const Setup& s) {
  const Packing packing = s.layout == Layout::padded ? Packing::padded : s.balances ? Packing::balanced : Packing::none;
  return {s.tp, s.pp, s.dp, s.cuts_tokens, int(packing), s.tied, int(s.recompute), s.shards, s.overlaps};
}
const std::array<std::vector<int>, 9> all_levels{
    {{1, 2, 4}, {1, 2, 4}, {1, 2}, {0, 1}, {0, 1, 2}, {0, 1}, {0, 1, 2}, {0, 1}, {0, 1}}};

// Up to 16 ranks; tokens are cut over ranks of a tensor-parallel group.
bool is_possible(const Levels& l) { return l[0] * l[1] * l[2] <= 16 && (l[3] == 0 || l[0] > 1); }

using Pairs = std::set<std::array<int, 4>>;  // property, its value, another property, its value
void add_pairs(Pairs& pairs, const Levels& l) {
  for (int a = 0; a < int(l.size()); ++a)
    for (int b = 0; b < a; ++b) pairs.insert({a, l[std::size_t(a)], b, l[std::size_t(b)]});
}

// Of all possible combinations.
void add_possible_pairs(Pairs& pairs, Levels& l, std::size_t next = 0) {
  if (next == l.size()) {
    if (is_possible(l)) add_pairs(pairs, l);
    return;
  }
  for (const int value : all_levels[next]) {
    l[next] = value;
    add_possible_pairs(pairs, l, next + 1);
  }
}

}  // namespace

TEST_CASE("every possible pair of values of two properties is in the cover") {
  Pairs wanted, covered;
  Levels l{};
  add_possible_pairs(wanted, l);
  CHECK(wanted.size() == (22 * 22 - 56) / 2 - 1);  // 22 values, of each two properties all pairs, but one
  for (const Setup& setup : cover()) {
    CHECK(is_possible(levels(setup)));
    add_pairs(covered, levels(setup));
  }
  CHECK(covered == wanted);
}

TEST_CASE("ten steps on a grid are ten steps on one rank", "[grid]") { check_equal(GENERATE(from_range(cover()))); }

TEST_CASE("waits for teachers, and of teachers, are means over the ranks that have one") {
  Setup setup;
  setup.tp = 2;
  setup.pp = GENERATE(1, 4);
  const Outcome outcome = train(setup);
  REQUIRE(outcome.teacher_waits.size() == std::size_t(steps));
  for (const double seconds : outcome.teacher_waits) CHECK(seconds == Approx(setup.micro_batches() * teacher_wait));
  REQUIRE(outcome.student_waits.size() == std::size_t(steps));
  for (const double seconds : outcome.student_waits) CHECK(seconds == Approx(setup.micro_batches() * student_wait));
  // The report at the end shares the step out over all ranks: of the teacher's time only the last stage's part.
  const double micro_batches = double(steps) * setup.micro_batches();
  CHECK(outcome.times.teacher == Approx(micro_batches * teacher_wait / setup.pp));
  CHECK(outcome.times.student_wait == Approx(micro_batches * student_wait));
}

TEST_CASE("a pipeline that waits says for which part of a step") {
  Setup setup;
  setup.pp = GENERATE(1, 4);
  setup.accumulation = 1;
  const Outcome outcome = train(setup);
  CHECK(outcome.bubbles.size() == std::size_t(setup.pp > 1 ? steps : 0));
  for (const double part : outcome.bubbles) CHECK((part > 0 && part < 1));
}

TEST_CASE("in bf16 a grid trains like one rank to rounding", "[grid]") {
  check_equal({.dtype = DType::bf16, .tp = 2, .pp = 2, .dp = 2, .cuts_tokens = true, .recompute = Recompute::full});
}

TEST_CASE("a grid gives the same bits twice", "[grid]") {
  const Setup setup{.family = "qwen3",
                    .objective = Objective::adaptive_kl,
                    .dtype = GENERATE(DType::f32, DType::bf16),
                    .tp = 2,
                    .pp = 2,
                    .dp = 2,
                    .cuts_tokens = true};
  const Outcome a = train(setup), b = train(setup);
  CHECK(a.losses == b.losses);
  CHECK(a.norms == b.norms);
  CHECK(a.weights == b.weights);
  CHECK(a.differing == 0);
}

TEST_CASE("any grid, shape and cut of the batch trains like one rank", "[grid]") {
  std::mt19937 random(20);
  for (int round = 0; round < 5; ++round) check_equal(random_setup(random, 8));
}

// About a quarter of an hour on two cores.
TEST_CASE("every combination of grid, cut of tokens, layout, tie and recomputation", "[full]") {
  Setup s;
  s.tp = GENERATE(1, 2, 4);
  s.pp = GENERATE(1, 2, 4);
  s.dp = GENERATE(1, 2);
  s.cuts_tokens = GENERATE(false, true);
  s.layout = GENERATE(Layout::packed, Layout::padded);
  s.tied = GENERATE(false, true);
  s.recompute = GENERATE(Recompute::none, Recompute::selective, Recompute::full);
  if (s.tp * s.pp * s.dp <= 16) check_equal(s);
}

TEST_CASE("a hundred random runs", "[full]") {
  std::mt19937 random(std::random_device{}());
  for (int round = 0; round < 100; ++round) check_equal(random_setup(random, 16));
}
