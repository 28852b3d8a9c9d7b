// The training loop on tiny models: it learns, it is reproducible, it survives what is not finite, and it resumes.
#include "core/train/trainer.h"

#include <catch2/catch.hpp>
#include <chrono>
#include <cmath>
#include <limits>
#include <map>
#include <thread>

#include "core/train/stopwatch.h"
#include "core/train/teacher.h"
#include "kernels/backends.h"
#include "test/support/loss_reference.h"
#include "test/support/tiny_models.h"

using namespace distill;
using namespace distill::test;

namespace {

constexpr int real_vocabulary = 37;

struct Setup {
  double weight = 0.5;
  DType dtype = DType::f32;
  int per_device = 4, accumulation = 2;
  std::int64_t steps = 6;
  double lr = 3e-3;
  bool with_validation = false;
  float teacher_std = 0.3f;
  std::int64_t logging_steps = 1;
  OutlierAction outlier_action = OutlierAction::off;
  Objective objective = Objective::forward_kl;
};

// A whole run on one rank.
struct Run {
  Setup setup;
  std::unique_ptr<Device> device = make_cpu_device(1);
  EncodedDataSource data{random_samples(30, real_vocabulary, 1),
                         DataPlan{.shape = {setup.per_device, setup.accumulation, 1}}};
  EncodedDataSource validation{random_samples(7, real_vocabulary, 2), validation_plan(3, 1, 0, Layout::packed)};
  Transformer student, teacher_model;
  Optimizer optimizer;
  Alone alone;
  GradientSync sync;
  Teacher teacher;
  LocalTeacher source;
  std::vector<MetricRecord> records;
  std::vector<TrainState> saved;
  TrainState state;
  std::chrono::milliseconds save_time{0};
  double save_seconds = 0;
  std::vector<std::string> warnings;
  std::function<bool()> stop = [] { return false; };
  std::function<void(const MetricRecord&)> after_step = [](const MetricRecord&) {};

  static Transformer::Limits limits(const Run& r, bool trains) {
    return {.tokens = std::max(r.data.most_tokens(), r.validation.most_tokens()),
            .supervised = std::max(r.data.most_supervised(), r.validation.most_supervised()),
            .longest = 12,
            .trains = trains,
            .recompute = Recompute::none};
  }

  explicit Run(const Setup& s)
      : setup(s),
        student(*device, tiny_spec("qwen2", true), s.dtype, limits(*this, true)),
        teacher_model(*device, tiny_spec("qwen3", false), s.dtype, limits(*this, false)),
        optimizer(*device, student.table(), student.values(), {.max_grad_norm = 1}),
        sync(student.table(), student.values(), student.gradients(), {alone, alone}, true, true),
        teacher(*device, teacher_model, real_vocabulary, limits(*this, false).tokens, limits(*this, false).supervised),
        source(*device, teacher, s.dtype, 8) {
    randomise(*device, student, 1, 0.1f);
    randomise(*device, teacher_model, 2, s.teacher_std);
    optimizer.reset_masters();
  }

  Trainer::End go(std::int64_t steps) {
    TrainerOptions options;
    options.total_steps = steps;
    options.logging_steps = setup.logging_steps;
    options.save_steps = 2;
    options.eval_steps = 2;
    options.learning_rate = setup.lr;
    options.schedule = schedules::constant;
    options.loss.objective = setup.objective;
    options.loss.distill_weight = float(setup.weight);
    options.loss.vocabulary = real_vocabulary;
    options.logits_chunk = 8;
    options.outlier_action = setup.outlier_action;
    options.outlier_window = 5;
    options.outlier_zscore = 30;
    Trainer trainer(*device, student, optimizer, sync, setup.weight != 0 ? &source : nullptr, data,
                    setup.with_validation ? &validation : nullptr, {alone, alone, alone, alone}, options,
                    {.report =
                         [this](const MetricRecord& r) {
                           records.push_back(r);
                           after_step(r);
                         },
                     .save = [this](const TrainState& at) { save(at); },
                     .stop_requested = stop,
                     .warn = [this](const std::string& message) { warnings.push_back(message); }});
    return trainer.run(state);
  }

  void save(const TrainState& at) {
    const Stopwatch watch(*device, save_seconds);
    saved.push_back(at);
    std::this_thread::sleep_for(save_time);
  }

  double metric(std::size_t record, const std::string& name) const {
    for (const auto& [key, value] : records.at(record).values)
      if (key == name) return value;
    throw std::out_of_range(name);
  }
  std::vector<double> losses() const {
    std::vector<double> out;
    for (std::size_t i = 0; i < records.size(); ++i) out.push_back(metric(i, "train/loss"));
    return out;
  }
};

}  // namespace

TEST_CASE("the loss falls, with and without a teacher", "[trainer]") {
  const double weight = GENERATE(0.0, 0.5, 1.0);
  const DType dtype = GENERATE(DType::f32, DType::bf16, DType::f16);
  CAPTURE(weight, name_of(dtype));
  Run run({.weight = weight, .dtype = dtype, .steps = 30});
  CHECK(run.go(30) == Trainer::End::finished);
  REQUIRE(run.records.size() == 30);
  const auto losses = run.losses();
  CHECK(losses.back() < 0.97 * losses.front());
  const double ce = run.metric(0, "train/train_student_loss");
  const double kd = weight == 0 ? 0 : run.metric(0, "train/train_distill_loss");
  CHECK(losses.front() == Approx((1 - weight) * ce + weight * kd));
}

TEST_CASE("two runs are bit-identical", "[trainer]") {
  Run a({}), b({});
  a.go(6);
  b.go(6);
  CHECK(a.losses() == b.losses());
  CHECK(download<float>(*a.device, a.student.values()) == download<float>(*b.device, b.student.values()));
}

TEST_CASE("how a batch is cut into micro-batches changes loss and gradient by rounding only", "[trainer]") {
  Run whole({.per_device = 8, .accumulation = 1}), cut({.per_device = 2, .accumulation = 4});
  whole.go(5);
  cut.go(5);
  for (std::size_t i = 0; i < 5; ++i) {
    CHECK(cut.losses()[i] == Approx(whole.losses()[i]).epsilon(1e-5));
    CHECK(cut.metric(i, "student/grad_norm") == Approx(whole.metric(i, "student/grad_norm")).epsilon(1e-5));
  }
}

TEST_CASE("a teacher equal to the student gives no divergence and no gradient", "[trainer]") {
  Run run({.weight = 1});
  // The teacher is another family, so equality is made by the head: both heads zero give uniform distributions.
  run.device->zero(run.student.table().find("model.embed_tokens.weight")->in(run.student.values()));
  run.device->zero(run.teacher_model.table().find("lm_head.weight")->in(run.teacher_model.values()));
  run.go(1);
  CHECK(run.metric(0, "train/train_distill_loss") == Approx(0).margin(1e-6));
  CHECK(run.metric(0, "distill/student_entropy") == Approx(std::log(double(real_vocabulary))));
  CHECK(run.metric(0, "student/grad_norm") == Approx(0).margin(1e-6));
}

TEST_CASE("steps that are not finite change nothing and end the run after five in a row", "[trainer]") {
  Run run({.teacher_std = 0.3f});
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> head(std::size_t(run.teacher_model.table().find("lm_head.weight")->size()), nan);
  run.device->upload(run.teacher_model.table().find("lm_head.weight")->in(run.teacher_model.values()), head.data());
  const auto before = download<float>(*run.device, run.student.values());
  CHECK_THROWS_WITH(run.go(20), Catch::Contains("not finite in 5 steps in a row"));
  CHECK(run.state.step == 5);
  CHECK(run.optimizer.updates() == 0);
  CHECK(run.metric(4, "student/skipped_steps") == 5);
  CHECK(download<float>(*run.device, run.student.values()) == before);
}

// The teacher's logits are a thousand times as large in steps [first, last], which a reverse KL sees.
void make_spike(Run& run, std::int64_t first, std::int64_t last) {
  const View head = run.teacher_model.table().find("lm_head.weight")->in(run.teacher_model.values());
  const auto in_f32 = [&run, head] { return run.device->tensor(head.rows, head.cols, DType::f32); };
  Tensor now = in_f32();
  run.device->cast(now.view(), head);
  const auto calm = download<float>(*run.device, now.view());
  auto wild = calm;
  for (float& value : wild) value *= 1000;
  run.after_step = [&run, head, in_f32, calm, wild, first, last](const MetricRecord& r) {
    Tensor next = in_f32();
    run.device->upload(next.view(), r.step + 1 >= first && r.step + 1 <= last ? wild.data() : calm.data());
    run.device->cast(head, next.view());
  };
}

bool same_weights(Run& a, Run& b) {
  return download<float>(*a.device, a.student.values()) == download<float>(*b.device, b.student.values());
}

TEST_CASE("an outlier is warned of and taken, or skipped", "[trainer]") {
  const OutlierAction action = GENERATE(OutlierAction::off, OutlierAction::warn, OutlierAction::skip);
  Run run({.outlier_action = action, .objective = Objective::reverse_kl}), calm({.objective = Objective::reverse_kl});
  make_spike(run, 8, 8);
  CHECK(run.go(12) == Trainer::End::finished);
  CHECK(calm.go(7) == Trainer::End::finished);
  const bool is_skipped = action == OutlierAction::skip;
  CHECK(run.metric(11, "student/skipped_steps") == is_skipped);
  CHECK(run.optimizer.updates() == (is_skipped ? 11 : 12));
  if (action == OutlierAction::off) {
    CHECK(run.warnings.empty());
    CHECK_THROWS(run.metric(11, "student/outlier_steps"));  // no such metric
    return;
  }
  CHECK(run.metric(6, "student/outlier_steps") == 0);
  CHECK(run.metric(11, "student/outlier_steps") == 1);
  REQUIRE(run.warnings.size() == 1);
  CHECK_THAT(run.warnings[0], Catch::StartsWith("step 8: the loss ") && Catch::Contains(" of the 5 steps before"));
  CHECK((run.warnings[0].find("; the step is skipped") != std::string::npos) == is_skipped);
  std::vector<double> before = run.losses();
  before.resize(7);
  CHECK(before == calm.losses());
}

TEST_CASE("outliers that are skipped change no weight, and too many in a row end the run", "[trainer]") {
  Run run({.outlier_action = OutlierAction::skip, .objective = Objective::reverse_kl}),
      calm({.objective = Objective::reverse_kl});
  make_spike(run, 8, 100);
  CHECK_THROWS_WITH(run.go(20),
                    Catch::Contains("not finite or an outlier in 5 steps in a row, the last of them step 12"));
  CHECK(run.warnings.size() == 5);
  calm.go(7);
  CHECK(same_weights(run, calm));
}

TEST_CASE("an outlier that stops the run leaves it as it was before that step", "[trainer]") {
  Run run({.outlier_action = OutlierAction::stop, .objective = Objective::reverse_kl}),
      calm({.objective = Objective::reverse_kl});
  make_spike(run, 8, 8);
  try {
    run.go(12);
    FAIL("no error came");
  } catch (const CommonError& error) {
    CHECK(error.code() == ExitCode::non_finite);
    CHECK_THAT(error.what(),
               Catch::StartsWith("step 8: the loss ") && Catch::Contains("the state after step 7 is saved"));
  }
  CHECK(run.records.size() == 8);
  CHECK(run.saved.back().step == 7);
  CHECK(run.saved.back().outlier_steps == 0);
  calm.go(7);
  CHECK(same_weights(run, calm));
  // On with the saved state, without the step that stood out.
  run.setup.outlier_action = OutlierAction::skip;
  run.state = run.saved.back();
  make_spike(run, 8, 8);
  run.after_step({.step = 7, .wall_time = 0, .values = {}});
  CHECK(run.go(12) == Trainer::End::finished);
  CHECK(run.state.outlier_steps == 1);
  CHECK(run.optimizer.updates() == 11);
}

TEST_CASE("f16 overflow shrinks the loss scale before it counts as a failure", "[trainer]") {
  Run run({.weight = 0, .dtype = DType::f16});
  run.state.loss_scale = 16777216;  // 2^24: gradients of order 0.1 overflow f16
  CHECK(run.go(12) == Trainer::End::finished);
  CHECK(run.state.loss_scale < 16777216);
  CHECK(run.state.optimizer_updates < 12);
  CHECK(run.state.optimizer_updates > 0);
}

TEST_CASE("saves come at their period and at the end, validation too", "[trainer]") {
  Run run({.with_validation = true});
  run.go(5);
  REQUIRE(run.saved.size() == 3);
  CHECK(run.saved[0].step == 2);
  CHECK(run.saved[2].step == 5);
  CHECK(run.metric(1, "student/val_loss") > 0);
  CHECK_THROWS(run.metric(0, "student/val_loss"));
  CHECK(run.metric(4, "student/val_loss") > 0);
  CHECK(run.saved[0].validation_loss == run.metric(1, "student/val_loss"));
  CHECK(run.saved[2].validation_loss == run.metric(4, "student/val_loss"));
}

TEST_CASE("the time of a save is in the next report, however late that is", "[trainer]") {
  Run run({.logging_steps = 4});
  run.save_time = std::chrono::milliseconds(50);
  run.go(12);
  REQUIRE(run.records.size() == 3);
  CHECK(run.metric(0, "time/checkpoint_stall") >= 0.05);  // step 2
  CHECK(run.metric(1, "time/checkpoint_stall") >= 0.10);  // steps 4 and 6
  CHECK(run.metric(2, "time/checkpoint_stall") >= 0.10);  // steps 8 and 10
  // And none twice.
  double reported = 0;
  for (std::size_t record = 0; record < 3; ++record) reported += run.metric(record, "time/checkpoint_stall");
  CHECK(reported < 1.2 * run.save_seconds);
}

TEST_CASE("a checkpoint knows the last step that was reported", "[trainer]") {
  Run run({.logging_steps = 4});
  run.go(9);
  std::vector<std::int64_t> reported;
  for (const TrainState& state : run.saved) reported.push_back(state.last_record);
  CHECK(reported == std::vector<std::int64_t>{0, 4, 4, 8, 9});
}

TEST_CASE("a checkpoint of a step that was not validated has no validation loss", "[trainer]") {
  Run run({.with_validation = true});
  run.stop = [&] { return run.records.size() == 3; };
  run.go(5);
  REQUIRE(run.saved.back().step == 3);
  CHECK(run.saved[0].validation_loss.has_value());
  CHECK_FALSE(run.saved.back().validation_loss.has_value());
}

namespace {

// Logits of the supervised positions of one sample, products in double.
std::vector<reference::Numbers> logits_of(Device& device, Transformer& model, const MicroBatch& micro) {
  BatchOnDevice batch(device, std::int64_t(micro.tokens.size()), std::int64_t(micro.supervised.size()));
  const View hidden = model.forward(batch.upload(micro));
  const auto h = download<float>(device, hidden), head = download<float>(device, model.head(real_vocabulary));
  std::vector<reference::Numbers> all;
  for (std::int64_t row = 0; row < hidden.rows; ++row) {
    reference::Numbers& logits = all.emplace_back(std::size_t(real_vocabulary), 0.0);
    for (std::int64_t v = 0; v < real_vocabulary; ++v)
      for (std::int64_t i = 0; i < hidden.cols; ++i)
        logits[std::size_t(v)] +=
            double(h[std::size_t(row * hidden.cols + i)]) * head[std::size_t(v * hidden.cols + i)];
  }
  return all;
}

}  // namespace

TEST_CASE("validation is the mean over every supervised position of the whole set", "[trainer]") {
  const double weight = GENERATE(0.0, 0.5);
  Run run({.weight = weight, .with_validation = true});
  run.go(1);
  // Sample by sample, with the weights after the step.
  LossSpec spec;
  spec.vocabulary = real_vocabulary;
  double loss = 0, divergence = 0, agreement = 0, positions = 0;
  const Samples& samples = run.validation.samples();
  REQUIRE(samples.size() % 3 != 0);  // of which batches are made
  for (std::int32_t i = 0; i < samples.size(); ++i) {
    const MicroBatch micro = assemble(samples, std::array{i}, Layout::packed);
    const auto student = logits_of(*run.device, run.student, micro),
               teacher = logits_of(*run.device, run.teacher_model, micro);
    for (std::size_t p = 0; p < student.size(); ++p, ++positions) {
      const auto term = reference::loss(student[p], teacher[p], std::size_t(micro.labels[p]), spec);
      loss += term.cross_entropy;
      divergence += term.divergence;
      agreement += term.top1_agreement;
    }
  }
  CHECK(run.metric(0, "student/val_loss") == Approx(loss / positions).epsilon(1e-5));
  CHECK(run.metric(0, "student/val_perplexity") == Approx(std::exp(loss / positions)).epsilon(1e-5));
  if (weight == 0) {
    CHECK_THROWS(run.metric(0, "student/val_distill_loss"));
    CHECK_THROWS(run.metric(0, "student/val_top1_agreement"));
  } else {
    CHECK(run.metric(0, "student/val_distill_loss") == Approx(divergence / positions).epsilon(1e-5));
    CHECK(agreement > 0);
    CHECK(run.metric(0, "student/val_top1_agreement") == Approx(agreement / positions));
  }
}

TEST_CASE("a stop request saves and ends at the next step", "[trainer]") {
  Run run({});
  run.stop = [&] { return run.records.size() == 3; };
  CHECK(run.go(10) == Trainer::End::stopped);
  CHECK(run.state.step == 3);
  CHECK(run.saved.back().step == 3);
}

TEST_CASE("a run continued from its state equals the uninterrupted one bit for bit", "[trainer]") {
  const DType dtype = GENERATE(DType::f32, DType::bf16);
  // Step 7 is told to be an outlier by steps on both sides of the interruption.
  const Setup setup{.dtype = dtype, .outlier_action = OutlierAction::skip, .objective = Objective::reverse_kl};
  Run whole(setup);
  make_spike(whole, 7, 7);
  whole.go(8);
  CHECK(whole.state.outlier_steps == 1);

  Run first(setup);
  first.stop = [&] { return first.state.step == 3; };
  first.go(8);
  Run second(setup);
  make_spike(second, 7, 7);
  const auto carry = [&](const View& from, const View& to) {
    if (!from.data) return;
    std::vector<char> bytes(std::size_t(from.size()) * size_of(from.dtype));
    first.device->download(bytes.data(), from);
    second.device->upload(to, bytes.data());
  };
  carry(first.student.values(), second.student.values());
  carry(first.optimizer.masters(), second.optimizer.masters());
  carry(first.optimizer.exp_avg(), second.optimizer.exp_avg());
  carry(first.optimizer.exp_avg_sq(), second.optimizer.exp_avg_sq());
  second.state = first.state;
  second.go(8);

  auto joined = first.losses();
  const auto rest = second.losses();
  joined.insert(joined.end(), rest.begin(), rest.end());
  CHECK(joined == whole.losses());
  const auto bits = [](Run& r) {
    std::vector<char> bytes(std::size_t(r.student.values().size()) * size_of(r.student.values().dtype));
    r.device->download(bytes.data(), r.student.values());
    return bytes;
  };
  CHECK(bits(second) == bits(whole));
}
