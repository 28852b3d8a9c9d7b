// Whole models against transformers and torch: logits, loss parts, every gradient and a training run of small random
// models of every family, read from their Hugging Face folders, on the first of backends(). Values:
// tools/golden/make_model_golden.py.
#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <span>

#include "core/train/teacher.h"
#include "core/train/trainer.h"
#include "io/model_folder.h"
#include "io/safetensors.h"
#include "test/support/backends.h"
#include "test/support/tiny_models.h"

using namespace distill;
using namespace distill::test;
using nlohmann::json;

namespace {

const std::string folder = DISTILL_SOURCE_DIR "/test/golden/models/";

const json& golden() {
  static const json document = json::parse(std::ifstream(folder + "cases.json"));
  return document;
}
std::int64_t real_vocabulary() { return golden().at("real_vocabulary"); }

const json& case_of(const std::string& student) {
  for (const json& c : golden().at("cases"))
    if (c.at("student") == student) return c;
  throw std::out_of_range(student);
}

const std::vector<std::string>& model_names() {
  static const std::vector<std::string> names = {"qwen2_tied",   "qwen2_untied", "qwen3",
                                                 "llama_scaled", "llama_tied",   "mistral"};
  return names;
}

Samples golden_samples() {
  SampleBuilder samples;
  for (const json& s : golden().at("samples"))
    samples.add(s.at("tokens").get<std::vector<std::int32_t>>(), s.at("prompt_length"));
  return std::move(samples).finish();
}

std::vector<MicroBatch> golden_micro_batches() {
  const Samples samples = golden_samples();
  std::vector<MicroBatch> result;
  for (const json& indices : golden().at("micro_batches"))
    result.push_back(assemble(samples, indices.get<std::vector<std::int32_t>>(), Layout::packed));
  return result;
}

// A golden file's tensors, all f32.
class GoldenTensors {
 public:
  explicit GoldenTensors(const std::string& name) : file_(folder + name) {}
  std::vector<float> operator[](const std::string& name) const {
    const SafeTensor& tensor = file_.tensors().at(name);
    REQUIRE(tensor.dtype == "F32");
    std::vector<float> values(tensor.bytes.size() / sizeof(float));
    std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
    return values;
  }

 private:
  SafetensorsFile file_;
};

// What is kept of a tensor where the whole of it would be too much: its 2-norm and its products with sign vectors.
constexpr std::size_t fingerprint_size = 5;
using Fingerprint = std::array<double, fingerprint_size>;

std::uint64_t splitmix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

Fingerprint fingerprint(const std::vector<double>& tensor) {
  Fingerprint print{};
  for (std::uint64_t i = 0; i < tensor.size(); ++i) {
    const double x = tensor[i];
    print[0] += x * x;
    for (std::uint64_t r = 0; r + 1 < fingerprint_size; ++r) {
      const bool negative = splitmix(splitmix(r) + i * 0x9e3779b97f4a7c15) >> 63;
      print[r + 1] += negative ? -x : x;
    }
  }
  print[0] = std::sqrt(print[0]);
  return print;
}

// Largest difference of two fingerprints, as a part of the norm.
double distance(const Fingerprint& found, const float* expected) {
  double largest = 0;
  for (std::size_t i = 0; i < fingerprint_size; ++i) largest = std::max(largest, std::abs(found[i] - expected[i]));
  return largest / expected[0];
}

// ‖found − expected‖ / ‖expected‖
template <class Found, class Expected>
double relative_error(const Found& found, const Expected& expected) {
  REQUIRE(found.size() == expected.size());
  double squares = 0, off = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    squares += double(expected[i]) * expected[i];
    off += (found[i] - expected[i]) * (found[i] - expected[i]);
  }
  return std::sqrt(off / squares);
}

// The part of a flat storage that belongs to a parameter, on the host.
std::vector<double> values_of(Device& device, const Param& param, const View& flat) {
  Tensor wide = device.tensor(param.rows, param.cols, DType::f64);
  device.cast(wide.view(), param.in(flat));
  return download<double>(device, wide.view());
}

// The model of a folder; its weights are rounded to `dtype`.
std::unique_ptr<Transformer> load_model(Device& device, const std::string& name, DType dtype,
                                        const Transformer::Limits& limits) {
  auto model = std::make_unique<Transformer>(device, read_model_spec(folder + name), dtype, limits);
  const auto store = [&](const Param& param, std::int64_t first, std::span<const float> part) {
    Tensor staging = device.tensor(1, std::int64_t(part.size()), DType::f32);
    device.upload(staging.view(), part.data());
    device.cast(model->values().col_slice(param.offset + first, staging.view().cols), staging.view());
  };
  REQUIRE(load_weights(folder + name, model->table(), model->table(), store));
  return model;
}

Objective objective_of(const json& variant) {
  const auto it = std::find(objective_names.begin(), objective_names.end(), variant.at("objective").get<std::string>());
  return Objective(it - objective_names.begin());
}

LossSpec loss_spec(const json& variant) {
  return {.objective = objective_of(variant),
          .distill_weight = variant.at("distill_weight"),
          .temperature = variant.at("temperature"),
          .teacher_temperature = variant.at("teacher_temperature"),
          .adaptive_alpha = variant.at("adaptive_alpha"),
          .skew_lambda = variant.at("skew_lambda"),
          .topk = variant.at("topk"),
          .topk_mode = variant.at("topk_mode") == "tail" ? TopkMode::tail : TopkMode::renormalize,
          .vocabulary = real_vocabulary()};
}

// Student and teacher of a case, on one rank.
struct Pair {
  static constexpr std::int64_t chunk = 7;  // cuts the positions of a micro-batch unevenly
  static constexpr int longest = 37;        // of golden_samples()

  std::shared_ptr<Device> device = backends().front().make();
  std::unique_ptr<Transformer> student, teacher_model;
  Teacher teacher;
  LocalTeacher source;

  static Transformer::Limits limits(std::int64_t tokens, std::int64_t supervised, bool trains) {
    return {
        .tokens = tokens, .supervised = supervised, .longest = longest, .trains = trains, .recompute = Recompute::none};
  }

  Pair(const json& c, DType dtype, std::int64_t most_tokens, std::int64_t most_supervised)
      : student(load_model(*device, c.at("student"), dtype, limits(most_tokens, most_supervised, true))),
        teacher_model(load_model(*device, c.at("teacher"), dtype, limits(most_tokens, most_supervised, false))),
        teacher(*device, *teacher_model, real_vocabulary(), most_tokens, most_supervised),
        source(*device, teacher, dtype, chunk) {}

  // Means over the supervised positions of all micro-batches; their gradient is left in the student.
  LossSums forward_backward(const LossSpec& spec, const std::vector<MicroBatch>& micro_batches) {
    double count = 0;
    std::size_t most_tokens = 0, most_supervised = 0;
    for (const MicroBatch& micro : micro_batches) {
      count += double(micro.supervised.size());
      most_tokens = std::max(most_tokens, micro.tokens.size());
      most_supervised = std::max(most_supervised, micro.supervised.size());
    }
    BatchOnDevice batch(*device, std::int64_t(most_tokens), std::int64_t(most_supervised));
    HeadLoss head(*device, *student, spec, chunk, std::int64_t(most_supervised));
    device->zero(student->gradients());
    for (const MicroBatch& micro : micro_batches) {
      const View hidden = student->forward(batch.upload(micro));
      source.begin(micro);
      student->backward(batch.batch(), head.forward_backward(hidden, batch.labels(), &source, 1 / count));
    }
    LossSums means = head.take_sums();
    for (double& mean : means) mean /= count;
    return means;
  }

  std::vector<double> gradient(const std::string& name) {
    return values_of(*device, *student->table().find(name), student->gradients());
  }
};

// Relative. In f64 what remains is the rotary table, f32 as in transformers, and the golden values' own f32.
double tolerance_of(DType dtype) { return dtype == DType::f64 ? 1e-6 : 1e-5; }

std::int64_t most_tokens(const std::vector<MicroBatch>& micro_batches) {
  return std::int64_t(std::max_element(micro_batches.begin(), micro_batches.end(), [](const auto& a, const auto& b) {
                        return a.tokens.size() < b.tokens.size();
                      })->tokens.size());
}

}  // namespace

TEST_CASE("logits of every family are those of transformers", "[golden]") {
  const std::string name = GENERATE(from_range(model_names()));
  const DType dtype = GENERATE(DType::f32, DType::f64);
  CAPTURE(name, name_of(dtype));
  const auto device = backends().front().make();
  MicroBatch micro = golden_micro_batches().front();
  micro.supervised.resize(micro.tokens.size());  // every position
  std::iota(micro.supervised.begin(), micro.supervised.end(), 0);
  micro.labels.assign(micro.tokens.size(), 0);
  const auto tokens = std::int64_t(micro.tokens.size());
  const auto model = load_model(*device, name, dtype, Pair::limits(tokens, tokens, false));
  BatchOnDevice batch(*device, tokens, tokens);
  Tensor logits = device->tensor(tokens, real_vocabulary(), dtype),
         wide = device->tensor(tokens, real_vocabulary(), DType::f64);
  device->gemm(logits.view(), model->forward(batch.upload(micro)), transposed(model->head(real_vocabulary())));
  device->cast(wide.view(), logits.view());
  const std::vector<double> found = download<double>(*device, wide.view());

  const std::vector<float> expected = GoldenTensors("logits.safetensors")[name];
  REQUIRE(expected.size() == found.size());
  const auto columns = std::size_t(real_vocabulary());
  for (std::size_t begin = 0; begin < found.size(); begin += columns) {
    CAPTURE(begin / columns);
    CHECK(relative_error(std::span(found).subspan(begin, columns), std::span(expected).subspan(begin, columns)) <
          tolerance_of(dtype));
  }
}

namespace {

void check_loss_parts(const LossSums& means, const json& expected, DType dtype) {
  const double tolerance = tolerance_of(dtype);
  const auto close = [&](LossTerms::Column column, const char* key) {
    CAPTURE(name_of(dtype), key);
    // A divergence is a difference of logarithms around 5: near 0 its error is absolute.
    CHECK(means[column] == Approx(expected.at(key).get<double>()).epsilon(tolerance).margin(tolerance / 50));
  };
  close(LossTerms::cross_entropy, "cross_entropy");
  close(LossTerms::divergence, "divergence");
  close(LossTerms::student_entropy, "student_entropy");
  close(LossTerms::teacher_entropy, "teacher_entropy");
  close(LossTerms::top1_agreement, "top1_agreement");
}

}  // namespace

namespace {

// Fingerprints tie f64 to torch, and every element in f32 is compared with f64. A fingerprint alone does not measure
// the error as a part of the norm: along a sign vector an error of n elements may count up to √n times.
void check_gradients(const std::string& name, std::size_t first_variant, std::size_t end) {
  const json& c = case_of(name);
  const auto parameters = c.at("parameters").get<std::vector<std::string>>();
  const auto micro_batches = golden_micro_batches();
  const std::int64_t most = most_tokens(micro_batches);
  Pair in_f64(c, DType::f64, most, most), in_f32(c, DType::f32, most, most);
  REQUIRE(in_f64.student->table().all().size() == parameters.size());
  const GoldenTensors tensors(name + ".golden.safetensors");
  const std::vector<float> prints = tensors["fingerprints"];

  for (std::size_t v = first_variant; v < end; ++v) {
    const json& expected = c.at("variants")[v];
    CAPTURE(name, expected.dump());
    check_loss_parts(in_f64.forward_backward(loss_spec(expected), micro_batches), expected, DType::f64);
    check_loss_parts(in_f32.forward_backward(loss_spec(expected), micro_batches), expected, DType::f32);
    for (std::size_t p = 0; p < parameters.size(); ++p) {
      CAPTURE(parameters[p]);
      const std::vector<double> exact = in_f64.gradient(parameters[p]), found = in_f32.gradient(parameters[p]);
      CHECK(distance(fingerprint(exact), &prints[(v * parameters.size() + p) * fingerprint_size]) <
            tolerance_of(DType::f64));
      CHECK(relative_error(found, exact) < tolerance_of(DType::f32));
      if (v != c.at("full_gradient_variant")) continue;
      const std::vector<float> whole = tensors["gradient/" + parameters[p]];
      CHECK(relative_error(exact, whole) < tolerance_of(DType::f64));
      CHECK(relative_error(found, whole) < tolerance_of(DType::f32));
    }
  }
}

}  // namespace

TEST_CASE("loss parts and every parameter's gradient are those of torch", "[golden]") {
  const std::string name = GENERATE(from_range(model_names()));
  check_gradients(name, 0, case_of(name).at("variants").size());
}

// Of each family the objective whose gradients are known element by element: for a backend that takes minutes for all.
TEST_CASE("of each family one objective's gradients are those of torch", "[golden][few]") {
  const std::string name = GENERATE(from_range(model_names()));
  const std::size_t variant = case_of(name).at("full_gradient_variant");
  check_gradients(name, variant, variant + 1);
}

// On the whole vocabulary: where bf16 lets logits change places, the top k are other outcomes, for transformers too.
TEST_CASE("in bf16 losses and gradients are those of the same weights to bf16 rounding", "[golden]") {
  const std::string name = GENERATE(from_range(model_names()));
  const json& c = case_of(name);
  const auto parameters = c.at("parameters").get<std::vector<std::string>>();
  const auto micro_batches = golden_micro_batches();
  Pair pair(c, DType::bf16, most_tokens(micro_batches), most_tokens(micro_batches));
  const GoldenTensors tensors(name + ".golden.safetensors");
  const std::vector<float> prints = tensors["bf16_fingerprints"], noise = tensors["bf16_noise"];
  std::vector<double> squares(parameters.size(), 0.0);  // of the differences, as parts of the norm
  double count = 0;
  for (std::size_t v = 0; v < c.at("variants").size(); ++v) {
    const json& expected = c.at("variants")[v];
    if (expected.at("topk") != 0) continue;
    CAPTURE(name, expected.dump());
    const LossSums means = pair.forward_backward(loss_spec(expected), micro_batches);
    CHECK(means[LossTerms::cross_entropy] == Approx(expected.at("bf16_cross_entropy").get<double>()).epsilon(2e-3));
    CHECK(means[LossTerms::divergence] == Approx(expected.at("bf16_divergence").get<double>()).epsilon(4e-3));
    count += fingerprint_size;
    for (std::size_t p = 0; p < parameters.size(); ++p) {
      const float* print = &prints[(v * parameters.size() + p) * fingerprint_size];
      const Fingerprint found = fingerprint(pair.gradient(parameters[p]));
      for (std::size_t i = 0; i < fingerprint_size; ++i) {
        const double off = (found[i] - print[i]) / print[0];
        squares[p] += off * off;
      }
    }
  }
  // As far from exact as transformers when it computes in bf16: on average, and with leave for chance in each.
  double sum = 0;
  for (std::size_t p = 0; p < parameters.size(); ++p) {
    const double ratio = std::sqrt(squares[p] / count) / noise[p];
    CAPTURE(name, parameters[p], noise[p]);
    CHECK(ratio < 8);
    sum += ratio;
  }
  CAPTURE(name);
  CHECK(sum / double(parameters.size()) < 1.6);
}

TEST_CASE("thirty AdamW steps follow torch", "[golden]") {
  const std::string name = GENERATE(from_range(model_names()));
  CAPTURE(name);
  const json& c = case_of(name);
  const json& t = c.at("training");
  const EncodedDataSource data(golden_samples(),
                               DataPlan{.shape = {t.at("per_device"), t.at("accumulation"), 1}, .shuffle = false});
  Pair pair(c, DType::f32, data.most_tokens(), data.most_supervised());
  const std::vector<float> before = download<float>(*pair.device, pair.student->values());
  Optimizer optimizer(*pair.device, pair.student->table(), pair.student->values(),
                      {.beta1 = t.at("beta1"),
                       .beta2 = t.at("beta2"),
                       .epsilon = t.at("epsilon"),
                       .weight_decay = t.at("weight_decay"),
                       .max_grad_norm = t.at("max_grad_norm")});
  TrainerOptions options;
  options.total_steps = t.at("steps");
  options.learning_rate = t.at("learning_rate");
  options.schedule = schedules::cosine;
  options.warmup_steps = t.at("warmup");
  options.loss = loss_spec(t);
  options.logits_chunk = Pair::chunk;
  std::vector<MetricRecord> records;
  Alone alone;
  GradientSync sync(pair.student->table(), pair.student->values(), pair.student->gradients(), {alone, alone}, true,
                    true);
  Trainer trainer(*pair.device, *pair.student, optimizer, sync,
                  options.loss.distill_weight == 0 ? nullptr : &pair.source, data, nullptr,
                  {alone, alone, alone, alone}, options,
                  {.report = [&](const MetricRecord& r) { records.push_back(r); }, .save = {}, .stop_requested = {}});
  TrainState state;
  trainer.run(state);

  REQUIRE(records.size() == t.at("steps"));
  for (std::size_t k = 0; k < records.size(); ++k) {
    const std::map<std::string, double> found(records[k].values.begin(), records[k].values.end());
    const auto close = [&](const char* metric, const char* key) {
      CAPTURE(k, metric);
      CHECK(found.at(metric) == Approx(t.at(key)[k].get<double>()).epsilon(1e-4));
    };
    close("train/loss", "loss");
    close("train/train_student_loss", "cross_entropy");
    if (options.loss.distill_weight != 0) close("train/train_distill_loss", "divergence");
    close("student/lr", "lr");
    close("student/grad_norm", "grad_norm");
  }
  const auto parameters = c.at("parameters").get<std::vector<std::string>>();
  const std::vector<float> prints = GoldenTensors(name + ".golden.safetensors")["training_fingerprint"];
  double squares = 0, off = 0;  // over all parameters together
  for (std::size_t p = 0; p < parameters.size(); ++p) {
    CAPTURE(parameters[p]);
    const Param& param = *pair.student->table().find(parameters[p]);
    std::vector<double> way = values_of(*pair.device, param, pair.student->values());
    for (std::size_t i = 0; i < way.size(); ++i) way[i] -= before[std::size_t(param.offset) + i];
    const float* print = &prints[p * fingerprint_size];
    const double part = distance(fingerprint(way), print);
    // Where gradients are near 0 AdamW makes their rounding a part of the rate: torch's own f32 is 2e-4 off.
    CHECK(part < 5e-3);
    squares += double(print[0]) * print[0];
    off += part * part * print[0] * print[0];
  }
  CHECK(std::sqrt(off / squares) < 1e-4);
}
