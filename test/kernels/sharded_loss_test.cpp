// The loss with the vocabulary cut over ranks that are threads, against the textbook and the loss that is not cut.
#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/loss.h"
#include "parallel/parallel.h"
#include "test/support/loss_chunk.h"

namespace distill {
namespace {

using namespace distill::test;
constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

using Begins = std::vector<std::int64_t>;  // first column of each rank, then the number of columns

// The chunk's columns on as many ranks; checks that all have the same terms and leaves them in the chunk.
void run_cut(Chunk& chunk, const Begins& begins, float scale = 1, int threads = 1) {
  const int ranks = int(begins.size()) - 1;
  const auto rows = std::int64_t(chunk.labels.size());
  const ConstView labels(chunk.labels.data(), 1, rows, rows, DType::i32);
  const std::int64_t teacher_columns = chunk.teacher.view().cols;
  std::vector<Matrix> terms(std::size_t(ranks), Matrix(rows, LossTerms::count, chunk.terms.view().dtype));
  run_ranks(ranks, [&](Communicator& group) {
    const auto rank = std::size_t(group.rank());
    const std::int64_t first = begins[rank], columns = begins[rank + 1] - first;
    const std::int64_t teacher_first = std::min(first, teacher_columns);
    const ConstView teacher = chunk.has_teacher ? chunk.teacher.view().col_slice(
                                                      teacher_first, std::min(columns, teacher_columns - teacher_first))
                                                : ConstView();
    LossScratch scratch;
    // A second call finds what the first left in the scratch memory, of which f64 has none.
    for (int call = chunk.student.view().dtype == DType::f64; call < 2; ++call)
      loss_under_test(chunk.dlogits.view().col_slice(first, columns), terms[rank].view(),
                      chunk.student.view().col_slice(first, columns), teacher, labels, chunk.spec, scale, threads,
                      scratch, {first, &group});
  });
  for (const Matrix& t : terms) CHECK(t.bytes() == terms[0].bytes());
  for (std::int64_t r = 0; r < rows; ++r)
    for (int column = 0; column < LossTerms::count; ++column) chunk.terms.set(r, column, terms[0].get(r, column));
}

constexpr Cut cuts_of_140[] = {{0, TopkMode::renormalize}, {7, TopkMode::renormalize},   {7, TopkMode::tail},
                               {1, TopkMode::tail},        {100, TopkMode::renormalize}, {139, TopkMode::tail}};
// Uneven, without a column in front, in the middle and at the end, with padding only.
const Begins begins_of_140[] = {
    {0, 100, 151}, {0, 0, 33, 151}, {0, 70, 139, 145, 151}, {0, 1, 1, 140, 151}, {0, 64, 128, 151, 151}};
constexpr Types types_of_140[] = {
    {DType::f32, DType::bf16, DType::bf16}, {DType::f32, DType::f32, DType::f32}, {DType::f32, DType::f16, DType::f16}};

void check_against_whole(Chunk chunk, Objective objective, Cut cut, const Begins& begins) {
  const std::int64_t rows = chunk.student.view().rows;
  chunk.randomise(unsigned(objective) + 10);
  set(chunk.spec, objective, cut);
  chunk.spec.distill_weight = 0.7f;
  chunk.spec.adaptive_alpha = 0.4f;
  CAPTURE(objective_names[std::size_t(objective)], cut.topk, topk_mode_names[std::size_t(cut.mode)], begins,
          name_of(chunk.teacher.view().dtype), chunk.spec.temperature, chunk.spec.teacher_temperature);
  run_cut(chunk, begins, 0.25f);
  chunk.check_against_reference(0.25);
  CHECK(chunk.dlogits.gap_untouched());

  Chunk whole = chunk;
  whole.run(0.25f);
  const DType gradient = chunk.dlogits.view().dtype;
  const double storage = gradient == DType::bf16 ? 0x1p-7 : gradient == DType::f16 ? 0x1p-10 : 1e-5;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (int column = 0; column < LossTerms::count; ++column)
      CHECK(chunk.terms.get(r, column) == Approx(whole.terms.get(r, column)).epsilon(1e-5).margin(1e-6));
    for (std::int64_t c = 0; c < 151; ++c)
      CHECK(chunk.dlogits.get(r, c) == Approx(whole.dlogits.get(r, c)).epsilon(storage).margin(1e-6));
  }
}

TEST_CASE("every objective over a cut vocabulary has the terms and the gradient of the whole", "[loss]") {
  const int i = GENERATE(range(0, 6)), j = GENERATE(range(0, 6));  // each objective with each cut, the others in turn
  Chunk chunk(2, 140, types_of_140[(i + j) % 3], 11, 5);
  chunk.spec.temperature = i % 2 == 0 ? 1.0f : 2.5f;
  chunk.spec.teacher_temperature = j % 2 == 0 ? 1.0f : 0.8f;
  check_against_whole(chunk, Objective(i), cuts_of_140[j], begins_of_140[(i + j) % 5]);
}

TEST_CASE("a vocabulary cut anywhere has the terms and the gradient of the whole", "[loss][many]") {
  const Objective objective = any_objective();
  const Cut cut = cuts_of_140[GENERATE(range(0, 6))];
  const Begins begins = begins_of_140[GENERATE(range(0, 5))];
  check_against_whole({3, 140, types_of_140[GENERATE(0, 1)], 11, 5}, objective, cut, begins);
}

TEST_CASE("a cut vocabulary in double precision", "[loss]") {
  const Objective objective = any_objective();
  const Cut cut = GENERATE(Cut{0, TopkMode::renormalize}, Cut{7, TopkMode::renormalize}, Cut{60, TopkMode::tail});
  // Every reduction is a message: few cases.
  const bool is_three = GENERATE(false, true);
  const Begins begins = is_three ? Begins{0, 0, 33, 90} : Begins{0, 60, 90};
  Chunk chunk(1, 80, {DType::f64, is_three ? DType::f64 : DType::bf16, DType::f64}, 10);
  chunk.randomise(unsigned(objective) + 3);
  for (std::int64_t c = 0; c < 80; ++c) chunk.teacher.set(0, c, std::round(chunk.teacher.get(0, c)));
  set(chunk.spec, objective, cut);
  chunk.spec.temperature = 1.5f;
  CAPTURE(objective_names[std::size_t(objective)], cut.topk, begins);
  run_cut(chunk, begins, 0.5f);
  chunk.check_against_reference(0.5, 1e-9);
}

TEST_CASE("a cut vocabulary, temperatures and weights", "[loss][ranks][many]") {
  const Objective objective = any_objective();
  const Cut cut = GENERATE(Cut{0, TopkMode::renormalize}, Cut{9, TopkMode::renormalize}, Cut{9, TopkMode::tail});
  const float temperature = GENERATE(1.0f, 2.5f), teacher_temperature = GENERATE(1.0f, 0.8f);
  Chunk chunk(2, 100, {DType::f32, DType::bf16, DType::f32}, 3);
  chunk.randomise(4);
  set(chunk.spec, objective, cut);
  chunk.spec.temperature = temperature;
  chunk.spec.teacher_temperature = teacher_temperature;
  chunk.spec.distill_weight = GENERATE(0.5f, 1.0f);
  chunk.spec.skew_lambda = 0.3f;
  CAPTURE(objective_names[std::size_t(objective)], cut.topk, int(cut.mode), temperature, teacher_temperature,
          chunk.spec.distill_weight);
  run_cut(chunk, {0, 64, 103});
  chunk.check_against_reference();
}

TEST_CASE("a cut vocabulary without a teacher", "[loss][ranks]") {
  const DType type = GENERATE(DType::f32, DType::f64);
  const float scale = GENERATE(0.0f, 2.0f);
  Chunk chunk(3, 100, {type, type, type}, 7);
  chunk.randomise(2);
  chunk.spec.distill_weight = 0;
  chunk.spec.temperature = GENERATE(1.0f, 2.0f);
  chunk.has_teacher = false;
  run_cut(chunk, {0, 40, 100, 107}, scale);
  chunk.check_against_reference(scale);
}

TEST_CASE("a scale of zero leaves the terms of a cut vocabulary", "[loss]") {
  Chunk chunk(2, 100, {}, 3);
  chunk.randomise(8);
  set(chunk.spec, any_objective(), {GENERATE(0, 12), TopkMode::tail});
  run_cut(chunk, {0, 30, 103}, 0);
  chunk.check_against_reference(0);
}

// step > 0: logits on a grid, which have ties.
void check_threshold(Chunk chunk, const Begins& begins, double deviation, double step, float alpha, int topk) {
  chunk.randomise(unsigned(alpha * 100), deviation, 0.2);
  if (step > 0) chunk.round_teacher(step);
  set(chunk.spec, Objective::adaptive_kl, {topk, TopkMode::tail});
  chunk.spec.adaptive_alpha = alpha;
  CAPTURE(deviation, step, alpha, topk);
  run_cut(chunk, begins);
  chunk.check_against_reference();
}

TEST_CASE("adaptive_kl finds its threshold across ranks, among ties and in any distribution", "[loss]") {
  const int i = GENERATE(range(0, 5)), j = GENERATE(range(0, 3));
  check_threshold({2, 300, {DType::f32, DType::bf16, DType::f32}}, {0, 100, 101, 300},
                  std::array{0.0, 1e-4, 0.3, 2.0, 10.0}[std::size_t(i)], std::array{0.0, 0.5, 4.0}[std::size_t(j)],
                  std::array{0.03f, 0.5f, 0.97f}[std::size_t(i + j) % 3], i % 2 == 0 ? 0 : 50);
}

TEST_CASE("adaptive_kl finds its threshold across ranks in many distributions", "[loss][many]") {
  const double deviation = GENERATE(0.0, 1e-4, 0.3, 2.0, 10.0), step = GENERATE(0.0, 0.5, 4.0);
  const float alpha = GENERATE(0.03f, 0.5f, 0.97f);
  check_threshold({4, 1000, {DType::f32, DType::bf16, DType::f32}}, {0, 300, 301, 1000}, deviation, step, alpha,
                  GENERATE(0, 50));
}

void check_ties(double grid, int k, TopkMode mode) {
  Chunk chunk(2, 120, {DType::f32, DType::f32, DType::f32});
  chunk.randomise(5);
  for (std::int64_t r = 0; r < 2; ++r)
    for (std::int64_t c = 0; c < 120; ++c) chunk.teacher.set(r, c, std::round(chunk.teacher.get(r, c) / grid) * grid);
  chunk.teacher.set(0, 3, -0.0);
  chunk.teacher.set(0, 70, -infinity);
  chunk.teacher.set(0, 71, -2e9);  // reads the same
  set(chunk.spec, Objective::reverse_kl, {k, mode});
  CAPTURE(grid, k, int(mode));
  run_cut(chunk, {0, 50, 71, 120});
  chunk.check_against_reference();
}
constexpr double grids[] = {0.25, 2, 100};  // 100: all equal
constexpr TopkMode modes[] = {TopkMode::renormalize, TopkMode::tail};

TEST_CASE("ties at the edge of the k largest go to the lower id on whichever rank", "[loss]") {
  const int i = GENERATE(0, 1, 2), k = GENERATE(2, 63, 119);
  check_ties(grids[i], k, modes[(i + k) % 2]);
}

TEST_CASE("ties at the edge of the k largest, of more k", "[loss][many]") {
  const int k = GENERATE(1, 2, 16, 63, 119);
  check_ties(grids[GENERATE(0, 1, 2)], k, modes[GENERATE(0, 1)]);
}

TEST_CASE("extreme logits on a cut vocabulary give finite values and gradients", "[loss][many]") {
  const Objective objective = any_objective();
  const Cut cut = GENERATE(Cut{0, TopkMode::renormalize}, Cut{3, TopkMode::renormalize}, Cut{3, TopkMode::tail});
  constexpr std::size_t n = 40;
  const Numbers flat(n, 0.5), none(n, -infinity);
  Numbers one_hot = none, other_hot = none, steep(n), reverse_steep(n), huge(n, -3e38), alternating(n);
  one_hot[7] = 3;
  other_hot[11] = -2;
  huge[25] = 12;
  for (std::size_t j = 0; j < n; ++j) {
    steep[j] = j % 2 ? 1e4 : -1e4;
    reverse_steep[j] = 100.0 * double(j) - 2000;
    alternating[j] = j % 3 ? -infinity : double(j) / 4;
  }
  const Numbers kinds[] = {flat, none, one_hot, other_hot, steep, reverse_steep, huge, alternating};
  constexpr std::int64_t rows = std::int64_t(std::size(kinds) * std::size(kinds));
  Chunk chunk(rows, n, {DType::f32, GENERATE(DType::f32, DType::bf16), DType::f32}, 4);
  set(chunk.spec, objective, cut);
  for (std::int64_t r = 0; r < rows; ++r) {
    chunk.set(r, kinds[std::size_t(r) / std::size(kinds)], kinds[std::size_t(r) % std::size(kinds)]);
    chunk.labels[std::size_t(r)] = 7;
  }
  CAPTURE(objective_names[std::size_t(objective)], cut.topk, int(cut.mode));
  run_cut(chunk, GENERATE(Begins{0, 9, 44}, Begins{0, 20, 20, 26, 44}));
  chunk.check_against_reference();
}

void check_that_it_shows(float bad, bool in_student, std::int64_t at, Objective objective, Cut cut) {
  Chunk chunk(3, 100, {}, 2);
  chunk.randomise(1);
  set(chunk.spec, objective, cut);
  (in_student ? chunk.student : chunk.teacher).set(1, at, bad);
  CAPTURE(bad, in_student, at, cut.topk, int(cut.mode), int(objective));
  run_cut(chunk, {0, 40, 45, 102});
  CHECK(std::isfinite(chunk.terms.get(0, LossTerms::divergence)));
  CHECK(std::isnan(chunk.terms.get(1, LossTerms::divergence)));
  CHECK(std::isfinite(chunk.terms.get(2, LossTerms::divergence)));
}

TEST_CASE("NaN and infinity in one rank's columns reach the loss of all", "[loss]") {
  const bool in_student = GENERATE(false, true);
  const int i = GENERATE(0, 1, 2);
  check_that_it_shows(std::array{nan, -nan, infinity}[std::size_t(i)], in_student,
                      std::array{0, 50, 99}[std::size_t(i)],
                      std::array{Objective::forward_kl, Objective::adaptive_kl, Objective::reverse_kl}[std::size_t(i)],
                      in_student ? Cut{0, TopkMode::renormalize} : Cut{7, TopkMode::tail});
}

TEST_CASE("NaN and infinity anywhere in one rank's columns reach the loss of all", "[loss][many]") {
  const Cut cut = GENERATE(Cut{0, TopkMode::renormalize}, Cut{7, TopkMode::renormalize}, Cut{60, TopkMode::tail});
  const float bad = std::array{nan, -nan, infinity}[GENERATE(0u, 1u, 2u)];
  const bool in_student = GENERATE(false, true);
  const std::int64_t at = GENERATE(0, 50, 99);
  const Objective objective =
      GENERATE(Objective::forward_kl, Objective::reverse_kl, Objective::adaptive_kl, Objective::js_divergence);
  check_that_it_shows(bad, in_student, at, objective, cut);
}

TEST_CASE("NaN in one rank's columns in double precision and without a teacher", "[loss]") {
  const DType type = GENERATE(DType::f32, DType::f64);
  const bool with_teacher = GENERATE(false, true);
  const float bad = GENERATE(as<float>{}, nan, infinity);
  Chunk chunk(1, 50, {type, type, type});
  chunk.randomise(1);
  chunk.has_teacher = with_teacher;
  if (!with_teacher) chunk.spec.distill_weight = 0;
  set(chunk.spec, Objective::adaptive_kl, {GENERATE(0, 5), TopkMode::tail});
  chunk.student.set(0, 48, bad);
  CAPTURE(name_of(type), with_teacher, bad, chunk.spec.topk);
  run_cut(chunk, {0, 40, 50});
  CHECK(std::isnan(chunk.terms.get(0, with_teacher ? LossTerms::divergence : LossTerms::cross_entropy)));
}

TEST_CASE("a cut vocabulary gives the same bits again, whatever the number of threads", "[loss][many]") {
  const Objective objective = any_objective();
  Chunk chunk(7, 3000, {DType::f32, DType::bf16, DType::bf16});
  chunk.randomise(6);
  set(chunk.spec, objective, {GENERATE(0, 30), TopkMode::tail});
  const Begins begins{0, 1100, 3000};
  run_cut(chunk, begins);
  const auto gradient = chunk.dlogits.bytes(), terms = chunk.terms.bytes();
  run_cut(chunk, begins, 1, GENERATE(1, 3));
  CHECK(chunk.dlogits.bytes() == gradient);
  CHECK(chunk.terms.bytes() == terms);
}

TEST_CASE("a cut vocabulary of 151,936", "[loss][many]") {
  const Objective objective = GENERATE(Objective::adaptive_kl, Objective::skewed_reverse_kl);
  Chunk chunk(1, 151936, {DType::f32, DType::bf16, DType::f32});
  chunk.spec.vocabulary = 151665;
  chunk.randomise(9, GENERATE(0.2, 4.0));
  set(chunk.spec, objective, {GENERATE(0, 64), TopkMode::tail});
  CAPTURE(objective_names[std::size_t(objective)], chunk.spec.topk);
  run_cut(chunk, {0, 75840, 151936});
  chunk.check_against_reference();
}

}  // namespace
}  // namespace distill
