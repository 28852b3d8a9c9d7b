// The loss of a chunk of positions against textbook formulas in double precision (test/support/loss_reference.h).
#include "kernels/cpu/loss.h"

#include <hwy/targets.h>
#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "core/error.h"
#include "kernels/loss_rows.h"
#include "test/support/loss_chunk.h"
#include "test/support/thread_team.h"

namespace distill {
namespace {

using namespace distill::test;
constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

constexpr Cut cuts[] = {{0, TopkMode::renormalize}, {7, TopkMode::renormalize}, {7, TopkMode::tail},
                        {1, TopkMode::renormalize}, {1, TopkMode::tail},        {400, TopkMode::tail}};
constexpr Types formats[] = {{DType::f32, DType::f32, DType::f32}, {DType::f32, DType::bf16, DType::bf16},
                             {DType::f32, DType::f16, DType::f16}, {DType::f32, DType::f64, DType::f32},
                             {DType::f64, DType::f64, DType::f64}, {DType::f64, DType::bf16, DType::f64}};
Cut any_cut() { return cuts[GENERATE(range(0, 6))]; }

void check_against_textbook(Chunk& chunk, Objective objective, Cut cut) {
  chunk.randomise(unsigned(objective) + 10);
  set(chunk.spec, objective, cut);
  chunk.spec.distill_weight = 0.7f;
  chunk.spec.adaptive_alpha = 0.4f;
  const DType student = chunk.student.view().dtype;
  CAPTURE(objective_names[std::size_t(objective)], cut.topk, topk_mode_names[std::size_t(cut.mode)], name_of(student),
          name_of(chunk.teacher.view().dtype), name_of(chunk.dlogits.view().dtype), chunk.spec.temperature,
          chunk.spec.teacher_temperature);
  chunk.run(0.25f);
  chunk.check_against_reference(0.25, student == DType::f64 ? 1e-9 : 1e-5);
  CHECK(chunk.dlogits.gap_untouched());
  CHECK(chunk.terms.gap_untouched());
}

TEST_CASE("every objective with every number format, with every cut, and every cut with every format", "[loss]") {
  static_assert(objective_names.size() == 6 && std::size(cuts) == 6 && std::size(formats) == 6);
  const int i = GENERATE(range(0, 6)), j = GENERATE(range(0, 6));  // a Latin square: every pair once
  Chunk chunk(2, 500, formats[j], 21, 5);
  chunk.spec.temperature = std::array{1.0f, 2.5f, 0.5f}[std::size_t(i + 2 * j) % 3];
  chunk.spec.teacher_temperature = i % 2 == 0 ? 1.0f : 0.8f;
  check_against_textbook(chunk, Objective(i), cuts[(i + j) % 6]);
}

TEST_CASE("every objective, cut and number format equals the textbook", "[loss][many]") {
  const Objective objective = any_objective();
  const Cut cut = any_cut();
  Chunk chunk(3, 1531, formats[GENERATE(range(0, 6))], 21, 5);
  check_against_textbook(chunk, objective, cut);
}

TEST_CASE("temperatures and weights", "[loss][many]") {
  const Objective objective = any_objective();
  const Cut cut = GENERATE(Cut{0, TopkMode::renormalize}, Cut{9, TopkMode::renormalize}, Cut{9, TopkMode::tail});
  const float temperature = GENERATE(1.0f, 2.5f, 0.5f), teacher_temperature = GENERATE(1.0f, 0.8f);
  const float weight = GENERATE(0.0f, 0.5f, 1.0f);
  Chunk chunk(2, 600, {DType::f32, DType::bf16, DType::f32}, 3);
  chunk.randomise(4);
  set(chunk.spec, objective, cut);
  chunk.spec.temperature = temperature;
  chunk.spec.teacher_temperature = teacher_temperature;
  chunk.spec.distill_weight = weight;
  chunk.spec.skew_lambda = 0.3f;
  CAPTURE(objective_names[std::size_t(objective)], cut.topk, int(cut.mode), temperature, teacher_temperature, weight);
  chunk.run();
  chunk.check_against_reference();
}

TEST_CASE("a vocabulary of 151,936", "[loss][many]") {
  const Objective objective = any_objective();
  const Cut cut = GENERATE(Cut{0, TopkMode::renormalize}, Cut{64, TopkMode::tail});
  Chunk chunk(1, 151936, {DType::f32, DType::bf16, DType::f32});
  chunk.spec.vocabulary = 151665;
  chunk.randomise(9, GENERATE(0.2, 4.0));
  set(chunk.spec, objective, cut);
  CAPTURE(objective_names[std::size_t(objective)], cut.topk);
  chunk.run();
  chunk.check_against_reference();
}

TEST_CASE("extreme logits give finite values and gradients", "[loss][many]") {
  const Objective objective = any_objective();
  const Cut cut = GENERATE(Cut{0, TopkMode::renormalize}, Cut{3, TopkMode::renormalize}, Cut{3, TopkMode::tail});
  const DType teacher_type = GENERATE(DType::f32, DType::bf16);
  constexpr std::size_t n = 40;
  const Numbers flat(n, 0.5), none(n, -infinity);
  Numbers one_hot = none, other_hot = none, steep(n), reverse_steep(n), zeros(n, 0.0), huge(n, -3e38), alternating(n);
  one_hot[7] = 3;
  other_hot[11] = -2;
  huge[5] = 12;
  for (std::size_t j = 0; j < n; ++j) {
    steep[j] = j % 2 ? 1e4 : -1e4;
    reverse_steep[j] = 100.0 * double(j) - 2000;
    alternating[j] = j % 3 ? -infinity : double(j) / 4;
  }
  const Numbers rows[] = {flat, none, one_hot, other_hot, steep, reverse_steep, zeros, huge, alternating};
  Chunk chunk(1, n, {DType::f32, teacher_type, DType::f32}, 4);
  set(chunk.spec, objective, cut);
  chunk.labels = {7};
  for (std::size_t i = 0; i < std::size(rows); ++i) {
    for (std::size_t k = 0; k < std::size(rows); ++k) {
      CAPTURE(objective_names[std::size_t(objective)], cut.topk, int(cut.mode), i, k);
      chunk.set(0, rows[i], rows[k]);
      chunk.run();
      chunk.check_against_reference();
    }
  }
}

// −infinity reads as −1e9, beside which the logarithm of how many there are must not be lost.
TEST_CASE("a student with nothing but -infinity among the kept entries, or among the rest", "[loss]") {
  constexpr std::size_t n = 40;
  const bool among_rest = GENERATE(false, true);
  Numbers student(n, among_rest ? -infinity : 1.0), teacher(n, 0.0);
  for (const std::size_t j : {20, 21, 22}) {
    student[j] = among_rest ? 0.5 : -infinity;
    teacher[j] = 2 + double(j) / 10;
  }
  Chunk chunk(1, n, {DType::f32, GENERATE(DType::f32, DType::bf16), DType::f32}, 4);
  set(chunk.spec, any_objective(), {3, GENERATE(TopkMode::renormalize, TopkMode::tail)});
  chunk.labels = {20};
  chunk.set(0, student, teacher);
  chunk.run();
  chunk.check_against_reference();
}

TEST_CASE("equal distributions have no distance and no gradient", "[loss]") {
  const Objective objective = any_objective();
  const Cut cut = any_cut();
  Chunk chunk(2, 700);
  chunk.randomise(3, 4, 1);
  set(chunk.spec, objective, cut);
  chunk.spec.distill_weight = 1;
  chunk.run();
  for (std::int64_t r = 0; r < 2; ++r) {
    CHECK(std::abs(chunk.terms.get(r, LossTerms::divergence)) < 1e-7);
    CHECK(chunk.terms.get(r, LossTerms::top1_agreement) == 1);
    for (const double g : chunk.dlogits.row(r, 700)) CHECK(std::abs(g) < 2e-7);  // a few ulp
  }
}

TEST_CASE("a divergence is never negative beyond rounding", "[loss][many]") {
  const Objective objective = any_objective();
  const Cut cut = any_cut();
  Chunk chunk(64, 500);
  set(chunk.spec, objective, cut);
  for (const double similarity : {0.0, 0.9, 0.999, 0.99999}) {
    chunk.randomise(77, 5, similarity);
    chunk.run();
    for (std::int64_t r = 0; r < 64; ++r)
      CHECK(chunk.terms.get(r, LossTerms::divergence) > -5e-7);  // an ulp or two of exp
  }
}

TEST_CASE("the gradient is the derivative of the loss", "[loss]") {
  const Objective objective = any_objective();
  const Cut cut = GENERATE(Cut{0, TopkMode::renormalize}, Cut{5, TopkMode::renormalize}, Cut{5, TopkMode::tail});
  constexpr std::int64_t n = 13;
  Chunk chunk(1, n, {DType::f64, DType::f64, DType::f64});
  chunk.randomise(5, 2);
  set(chunk.spec, objective, cut);
  chunk.spec.temperature = 1.7f;
  chunk.spec.distill_weight = 0.6f;
  // The weights of adaptive_kl are constants for the gradient: the objective to differentiate has them fixed.
  double head = 1;
  if (objective == Objective::adaptive_kl) {
    LossSpec parts = chunk.spec;
    const auto value = [&](Objective o) {
      parts.objective = o;
      return reference::loss(chunk.student.row(0, n), chunk.teacher.row(0, n), 0, parts).divergence;
    };
    const double forward = value(Objective::forward_kl), reverse = value(Objective::reverse_kl);
    head = (value(Objective::adaptive_kl) - reverse) / (forward - reverse);
  }
  const auto loss_at = [&](std::int64_t j, double step) {
    Numbers s = chunk.student.row(0, n);
    s[std::size_t(j)] += step;
    LossSpec spec = chunk.spec;
    const auto part = [&](Objective o) {
      spec.objective = o;
      return reference::loss(s, chunk.teacher.row(0, n), std::size_t(chunk.labels[0]), spec);
    };
    const double w = double(spec.distill_weight);
    if (objective != Objective::adaptive_kl) {
      const reference::Loss all = part(objective);
      return (1 - w) * all.cross_entropy + w * all.divergence;
    }
    const reference::Loss forward = part(Objective::forward_kl), reverse = part(Objective::reverse_kl);
    return (1 - w) * forward.cross_entropy + w * (head * forward.divergence + (1 - head) * reverse.divergence);
  };
  chunk.run();
  for (std::int64_t j = 0; j < n; ++j) {
    const double h = 1e-5, slope = (loss_at(j, h) - loss_at(j, -h)) / (2 * h);
    CAPTURE(objective_names[std::size_t(objective)], cut.topk, int(cut.mode), j);
    CHECK(chunk.dlogits.get(0, j) == Approx(slope).margin(2e-9).epsilon(1e-6));
  }
}

// step > 0: logits on a grid, which have ties.
void check_threshold(Chunk chunk, double deviation, double step, float alpha, Cut cut) {
  chunk.randomise(unsigned(alpha * 100), deviation, 0.2);
  if (step > 0) chunk.round_teacher(step);
  set(chunk.spec, Objective::adaptive_kl, cut);
  chunk.spec.adaptive_alpha = alpha;
  CAPTURE(name_of(chunk.student.view().dtype), deviation, step, alpha, cut.topk);
  chunk.run();
  chunk.check_against_reference();
}

TEST_CASE("adaptive_kl finds its threshold among ties and in any distribution", "[loss]") {
  const int i = GENERATE(range(0, 5)), j = GENERATE(range(0, 3));
  const DType type = (i + j) % 2 == 0 ? DType::f32 : DType::f64;
  check_threshold({2, 400, {type, DType::bf16, type}}, std::array{0.0, 1e-4, 0.3, 2.0, 10.0}[std::size_t(i)],
                  std::array{0.0, 0.5, 4.0}[std::size_t(j)], std::array{0.03f, 0.5f, 0.97f}[std::size_t(i + j) % 3],
                  i % 2 == 0 ? Cut{0, TopkMode::renormalize} : Cut{50, TopkMode::tail});
}

TEST_CASE("adaptive_kl finds its threshold in many distributions", "[loss][many]") {
  const double deviation = GENERATE(0.0, 1e-4, 0.3, 2.0, 10.0), step = GENERATE(0.0, 0.5, 4.0);
  const float alpha = GENERATE(0.03f, 0.5f, 0.97f);
  const Cut cut = GENERATE(Cut{0, TopkMode::renormalize}, Cut{50, TopkMode::tail});
  for (const DType type : {DType::f32, DType::f64})
    check_threshold({4, 3000, {type, DType::bf16, type}}, deviation, step, alpha, cut);
}

TEST_CASE("top-k keeps the k largest, ties to the lower id", "[loss][host]") {
  const std::int64_t n = GENERATE(100, 1024, 20000);
  const int k = GENERATE(1, 2, 16, 99, 1000);
  const double grid = GENERATE(0.0, 0.25, 100.0);  // 100: all equal
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> teacher(static_cast<std::size_t>(n));
  for (float& t : teacher) t = grid > 0 ? float(std::round(normal(random) / grid) * grid) : normal(random);
  teacher[3] = -0.0f;
  teacher[50] = -infinity;
  simd::Row row;
  row.teacher = teacher.data();
  row.columns = n;
  if (k >= n) return;
  simd::Scratch scratch;
  REQUIRE(simd::find_topk(row, k, scratch));
  const auto expected = reference::topk_ids(Numbers(teacher.begin(), teacher.end()), std::size_t(k));
  CHECK(std::vector<std::size_t>(scratch.ids.begin(), scratch.ids.end()) == expected);

  const LossRow<float, float> plain{nullptr, teacher.data(), n, n, 0, 0};
  const TopkCut<float> cut = find_topk(Lone{}, plain, k);
  std::vector<std::size_t> kept;
  for (std::int64_t j = 0; j < n; ++j)
    if (cut.keeps({j, 0, readable(teacher[std::size_t(j)])})) kept.push_back(std::size_t(j));
  CHECK(kept == expected);
}

TEST_CASE("k of the vocabulary's size or more is the whole vocabulary", "[loss]") {
  Chunk chunk(1, 50);
  chunk.randomise(1);
  chunk.run();
  const auto bytes = chunk.dlogits.bytes();
  chunk.spec.topk = GENERATE(50, 51, 1000000);
  chunk.spec.topk_mode = TopkMode::tail;
  chunk.run();
  CHECK(chunk.dlogits.bytes() == bytes);
  CHECK(chunk.terms.get(0, LossTerms::topk_mass) == 1);
}

TEST_CASE("without a teacher only the cross-entropy is left", "[loss]") {
  const DType type = GENERATE(DType::f32, DType::f64);
  Chunk chunk(2, 300, {type, type, type}, 7);
  chunk.randomise(2);
  chunk.spec.distill_weight = 0;
  chunk.spec.temperature = GENERATE(1.0f, 2.0f);
  chunk.has_teacher = false;
  chunk.run(2);
  chunk.check_against_reference(2);
}

struct Bad {
  float value;
  bool in_student, with_teacher;
  std::int64_t at;
};
constexpr float bad_values[] = {nan, -nan, infinity};
constexpr std::int64_t bad_places[] = {0, 17, 599};

void check_that_it_shows(const Bad& bad, Objective objective, Cut cut, DType type) {
  Chunk chunk(1, 600, {type, type, type}, 2);
  chunk.randomise(1);
  set(chunk.spec, objective, cut);
  chunk.has_teacher = bad.with_teacher;
  if (!bad.with_teacher) chunk.spec.distill_weight = 0;
  (bad.in_student ? chunk.student : chunk.teacher).set(0, bad.at, bad.value);
  chunk.run();
  CAPTURE(bad.value, bad.in_student, bad.with_teacher, name_of(type), bad.at, cut.topk, int(cut.mode), int(objective));
  const double term = chunk.terms.get(0, bad.with_teacher ? LossTerms::divergence : LossTerms::cross_entropy);
  CHECK(std::isnan(term));
}

TEST_CASE("NaN and infinity among the logits reach the loss", "[loss]") {
  const int i = GENERATE(range(0, 6)), j = GENERATE(range(0, 6));
  check_that_it_shows({bad_values[(i + j) % 3], (i + j) % 2 == 0, true, bad_places[(i + 2 * j) % 3]}, Objective(i),
                      cuts[j], i % 4 < 2 ? DType::f32 : DType::f64);
}

TEST_CASE("NaN and infinity among the logits reach the loss of every objective with every cut", "[loss][many]") {
  const Objective objective = any_objective();
  const Cut cut = any_cut();
  const float value = bad_values[GENERATE(0, 1, 2)];
  const std::int64_t at = bad_places[GENERATE(0, 1, 2)];
  const DType type = GENERATE(DType::f32, DType::f64);
  for (const bool in_student : {false, true}) check_that_it_shows({value, in_student, true, at}, objective, cut, type);
}

TEST_CASE("NaN and infinity among the logits reach the cross-entropy without a teacher", "[loss]") {
  check_that_it_shows({bad_values[GENERATE(0, 1, 2)], true, false, bad_places[GENERATE(0, 1, 2)]},
                      Objective::forward_kl, cuts[0], GENERATE(DType::f32, DType::f64));
}

TEST_CASE("the number of threads does not change a bit", "[loss][host]") {
  const Objective objective = any_objective();
  Chunk chunk(7, 5000, {DType::f32, DType::bf16, DType::bf16});
  chunk.randomise(6);
  set(chunk.spec, objective, {GENERATE(0, 30), TopkMode::tail});
  chunk.run(1, 1);
  const auto gradient = chunk.dlogits.bytes(), terms = chunk.terms.bytes();
  chunk.run(1, GENERATE(2, 5));
  CHECK(chunk.dlogits.bytes() == gradient);
  CHECK(chunk.terms.bytes() == terms);
}

// On the virtual GPU: in another order of threads and blocks.
TEST_CASE("a second call gives the same bits", "[loss]") {
  Chunk chunk(3, 700, {DType::f32, DType::bf16, DType::bf16});
  chunk.randomise(6);
  set(chunk.spec, any_objective(), {GENERATE(0, 30), TopkMode::tail});
  chunk.run();
  const auto gradient = chunk.dlogits.bytes(), terms = chunk.terms.bytes();
  chunk.run();
  CHECK(chunk.dlogits.bytes() == gradient);
  CHECK(chunk.terms.bytes() == terms);
}

// The numbers of m behind `lead` other columns and before a gap of one.
Matrix moved(const Matrix& m, std::int64_t lead) {
  const ConstView from = m.view();
  Matrix to(from.rows, lead + from.cols, from.dtype, 1);
  for (std::int64_t r = 0; r < from.rows; ++r)
    for (std::int64_t c = 0; c < from.cols; ++c) to.set(r, lead + c, m.get(r, c));
  return to;
}

TEST_CASE("where rows begin in memory does not change a bit", "[loss]") {
  const Types types = GENERATE(Types{DType::f32, DType::bf16, DType::bf16}, Types{DType::f32, DType::f16, DType::f16},
                               Types{DType::f32, DType::f32, DType::f32}, Types{DType::f64, DType::f64, DType::f64});
  const bool has_teacher = GENERATE(true, false);
  constexpr std::int64_t rows = 2, vocabulary = 1037;
  Chunk chunk(rows, vocabulary, types, 7, 4);  // every row begins at a multiple of 16 bytes
  chunk.randomise(31);
  chunk.has_teacher = has_teacher;
  if (!has_teacher)
    chunk.spec.distill_weight = 0;
  else
    set(chunk.spec, GENERATE(Objective::adaptive_kl, Objective::js_divergence), {GENERATE(0, 9), TopkMode::tail});
  chunk.run();
  chunk.check_against_reference();

  const std::int64_t lead = GENERATE(0, 1, 4), columns = chunk.student.view().cols;
  CAPTURE(name_of(types.student), name_of(types.teacher), has_teacher, chunk.spec.topk, lead);
  const Matrix student = moved(chunk.student, lead), teacher = moved(chunk.teacher, lead);
  Matrix dlogits(rows, lead + columns, types.gradient, 1), terms(rows, LossTerms::count, types.student, 4);
  loss_under_test(dlogits.view().col_slice(lead, columns), terms.view(), student.view().col_slice(lead, columns),
                  has_teacher ? teacher.view().col_slice(lead, chunk.teacher.view().cols) : ConstView(),
                  ConstView(chunk.labels.data(), 1, rows, rows, DType::i32), chunk.spec, 1, 1, chunk.scratch);
  CHECK(dlogits.bytes() == moved(chunk.dlogits, lead).bytes());
  CHECK(terms.bytes() == chunk.terms.bytes());
}

TEST_CASE("a scale of zero leaves a zero gradient and the terms", "[loss]") {
  Chunk chunk(2, 100, {}, 3);
  chunk.randomise(8);
  chunk.run(0);
  chunk.check_against_reference(0);
}

TEST_CASE("a label outside the vocabulary is named", "[loss][host]") {
  Chunk chunk(2, 10);
  chunk.randomise(8);
  chunk.labels[1] = 10;
  CHECK_THROWS_WITH(chunk.run(), "distill_loss: label 10 of position 1 is not in the vocabulary of 10");
}

TEST_CASE("every instruction set of this machine gives the textbook's numbers", "[loss][host]") {
  const Objective objective = any_objective();
  const Cut cut = any_cut();
  const std::int64_t all = hwy::SupportedTargets();
  for (std::int64_t left = all; left != 0; left &= left - 1) {
    hwy::SetSupportedTargetsForTest(left & -left);
    Chunk chunk(2, 1200, {DType::f32, DType::f16, DType::f16}, 5);
    chunk.randomise(12);
    set(chunk.spec, objective, cut);
    CAPTURE(hwy::TargetName(left & -left), objective_names[std::size_t(objective)], cut.topk);
    chunk.run();
    chunk.check_against_reference();
    chunk.student.set(0, 1100, nan);
    chunk.run();
    CHECK(std::isnan(chunk.terms.get(0, LossTerms::divergence)));
  }
  hwy::SetSupportedTargetsForTest(0);
}

TEST_CASE("torch computes the same losses and gradients", "[loss][golden]") {
  std::ifstream file(DISTILL_SOURCE_DIR "/test/golden/loss.json");
  const auto golden = nlohmann::json::parse(file);
  const auto student = golden.at("student").get<std::vector<Numbers>>();
  const auto teacher = golden.at("teacher").get<std::vector<Numbers>>();
  const auto rows = std::int64_t(student.size()), vocabulary = std::int64_t(student[0].size());
  for (const DType type : {DType::f64, DType::f32}) {
    const double tolerance = type == DType::f64 ? 1e-12 : 1e-5, margin = type == DType::f64 ? 1e-14 : 1e-7;
    Chunk chunk(rows, vocabulary, {type, type, type}, 2);
    for (std::int64_t r = 0; r < rows; ++r) chunk.set(r, student[std::size_t(r)], teacher[std::size_t(r)]);
    chunk.labels = golden.at("labels").get<std::vector<std::int32_t>>();
    for (const auto& expected : golden.at("cases")) {
      LossSpec& spec = chunk.spec;
      const auto name = expected.at("objective").get<std::string>(), mode = expected.at("topk_mode").get<std::string>();
      spec.objective =
          Objective(std::find(objective_names.begin(), objective_names.end(), name) - objective_names.begin());
      spec.topk_mode =
          TopkMode(std::find(topk_mode_names.begin(), topk_mode_names.end(), mode) - topk_mode_names.begin());
      spec.topk = expected.at("topk");
      spec.distill_weight = golden.at("distill_weight");
      spec.temperature = expected.at("temperature");
      spec.teacher_temperature = expected.at("teacher_temperature");
      spec.adaptive_alpha = expected.at("adaptive_alpha");
      spec.skew_lambda = expected.at("skew_lambda");
      CAPTURE(name_of(type), name, mode, spec.topk, spec.temperature);
      chunk.run();
      const std::pair<int, const char*> terms[] = {{LossTerms::cross_entropy, "cross_entropy"},
                                                   {LossTerms::divergence, "divergence"},
                                                   {LossTerms::student_entropy, "student_entropy"},
                                                   {LossTerms::teacher_entropy, "teacher_entropy"}};
      for (std::int64_t r = 0; r < rows; ++r) {
        for (const auto& [column, term] : terms)
          CHECK(chunk.terms.get(r, column) ==
                Approx(expected.at(term)[std::size_t(r)].get<double>()).epsilon(tolerance));
        const Numbers gradient = expected.at("gradient")[std::size_t(r)];
        for (std::int64_t c = 0; c < vocabulary; ++c)
          CHECK(chunk.dlogits.get(r, c) == Approx(gradient[std::size_t(c)]).epsilon(tolerance).margin(margin));
      }
    }
  }
}

// --- the plain passes, by a team of real threads and with the vocabulary cut over ranks

using PlainRow = LossRow<float, bf16>;

Chunk plain_chunk(Objective objective, Cut cut) {
  Chunk chunk(1, 61, {DType::f32, DType::bf16, DType::f32}, 4);
  chunk.randomise(21);
  for (std::int64_t c = 0; c < 61; ++c) chunk.teacher.set(0, c, std::round(chunk.teacher.get(0, c)));  // ties
  set(chunk.spec, objective, cut);
  chunk.spec.temperature = 1.5f;
  return chunk;
}

TEST_CASE("the plain passes by eight threads equal the textbook", "[loss][team][host]") {
  const Objective objective = any_objective();
  const Cut cut = GENERATE(Cut{0, TopkMode::renormalize}, Cut{5, TopkMode::renormalize}, Cut{5, TopkMode::tail});
  Chunk chunk = plain_chunk(objective, cut);
  CAPTURE(objective_names[std::size_t(objective)], cut.topk, int(cut.mode));
  const PlainRow row{chunk.student.view().as<float>(), chunk.teacher.view().as<bf16>(), 61, 65, 0, chunk.labels[0]};
  with_divergence(chunk.spec, [&](const auto& divergence) {
    run_team(8, [&](ThreadTeam team) {
      distill_row(team, chunk.dlogits.view().as<float>(), chunk.terms.view().as<float>(), row, divergence, chunk.spec,
                  1.0f);
    });
  });
  chunk.check_against_reference();
}

// One lane of its own rank, reductions over all ranks: what stands between the passes is all that ranks exchange.
class RankTeam : public ThreadTeam {
 public:
  explicit RankTeam(const ThreadTeam& ranks) : ThreadTeam(ranks) {}
  int rank() const { return ThreadTeam::lane(); }
  int lane() const { return 0; }
  int lanes() const { return 1; }
};

TEST_CASE("the plain passes over a cut vocabulary equal the whole", "[loss][team][host]") {
  const Objective objective = any_objective();
  const Cut cut = GENERATE(Cut{0, TopkMode::renormalize}, Cut{5, TopkMode::renormalize}, Cut{5, TopkMode::tail});
  Chunk chunk = plain_chunk(objective, cut);
  CAPTURE(objective_names[std::size_t(objective)], cut.topk, int(cut.mode));
  constexpr std::int64_t begins[] = {0, 7, 40, 61, 65};  // the last rank has nothing but padding
  std::vector<std::vector<float>> terms(4, std::vector<float>(LossTerms::count));
  with_divergence(chunk.spec, [&](const auto& divergence) {
    run_team(4, [&](ThreadTeam ranks) {
      const RankTeam team(ranks);
      const std::int64_t first = begins[team.rank()], end = begins[team.rank() + 1];
      const PlainRow row{chunk.student.view().as<float>() + first,
                         chunk.teacher.view().as<bf16>() + first,
                         std::max<std::int64_t>(0, std::min<std::int64_t>(end, 61) - first),
                         end - first,
                         first,
                         chunk.labels[0]};
      distill_row(team, chunk.dlogits.view().as<float>() + first, terms[std::size_t(team.rank())].data(), row,
                  divergence, chunk.spec, 1.0f);
    });
  });
  for (int column = 0; column < LossTerms::count; ++column) chunk.terms.set(0, column, terms[0][std::size_t(column)]);
  CHECK(std::all_of(terms.begin(), terms.end(), [&](const auto& t) { return t == terms[0]; }));
  chunk.check_against_reference();
}

}  // namespace
}  // namespace distill
