// One distillation step of known model pairs on one rank, both roles in turn: tokens per second and the share of the
// rate that a large matrix product reaches in the same run.
//   step_bench [pair] [dtype] [steps] [threads] [recompute]
//     pair: quickstart, smollm2, qwen2.5; dtype: bf16, f32; recompute: none, full, selective
#include <sys/resource.h>

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <random>
#include <string>
#include <thread>

#include "core/train/teacher.h"
#include "core/train/time_report.h"
#include "core/train/trainer.h"
#include "kernels/backends.h"

using namespace distill;

namespace {

struct Pair {
  ModelSpec teacher, student;
  int sequence_length, batch;
};

ModelSpec spec(const char* family, std::int64_t vocabulary, std::int64_t hidden, std::int64_t feed_forward, int layers,
               int q_heads, int kv_heads, int head_dim) {
  ModelSpec s;
  s.family = family;
  s.vocabulary = vocabulary;
  s.hidden = hidden;
  s.feed_forward = feed_forward;
  s.layers = layers;
  s.q_heads = q_heads;
  s.kv_heads = kv_heads;
  s.head_dim = head_dim;
  s.qkv_bias = std::string(family) == "qwen2";
  s.tied_head = true;
  return s;
}

const std::map<std::string, Pair> pairs = {
    {"quickstart", {spec("qwen2", 4160, 256, 896, 6, 4, 2, 64), spec("qwen2", 4096, 160, 448, 4, 5, 1, 32), 64, 64}},
    {"smollm2", {spec("llama", 49152, 576, 1536, 30, 9, 3, 64), spec("llama", 49152, 576, 1536, 15, 9, 3, 64), 512, 4}},
    {"qwen2.5",
     {spec("qwen2", 151936, 1536, 8960, 28, 12, 2, 128), spec("qwen2", 151936, 896, 4864, 24, 14, 2, 64), 512, 4}},
};

void randomise(Device& device, Transformer& model, std::uint64_t seed) {
  std::uint64_t index = 0;
  for (const Param& p : model.table().all())
    device.fill_normal(p.in(model.values()), seed, index++, 0, p.is_matrix ? 0.02f : 1.0f);
}

// Forward 2 and backward 4 FLOP a parameter and token, causal attention 4 and 8 a pair and column; embedding look-ups
// are free.
double flops(const ModelSpec& s, bool trains, double tokens, double length) {
  return (trains ? 6 : 2) * double(param_table(s).count()) * tokens +
         (trains ? 12 : 4) * double(s.layers) * double(s.q_cols()) * tokens * (length + 1) / 2;
}

const std::map<std::string, Recompute> recompute_named = {
    {"none", Recompute::none}, {"full", Recompute::full}, {"selective", Recompute::selective}};

double peak_memory_gib() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return double(usage.ru_maxrss) / (1 << 20);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "quickstart";
  const DType dtype = argc > 2 && std::string(argv[2]) == "f32" ? DType::f32 : DType::bf16;
  const std::string recompute = argc > 5 ? argv[5] : "none";
  const int steps = argc > 3 ? std::atoi(argv[3]) : 5,
            threads = argc > 4 ? std::atoi(argv[4]) : int(std::thread::hardware_concurrency());
  if (!pairs.contains(name)) {
    std::cerr << "no pair '" << name << "'; there are quickstart, smollm2, qwen2.5\n";
    return 2;
  }
  if (!recompute_named.contains(recompute)) {
    std::cerr << "no recomputation '" << recompute << "'; there are none, full, selective\n";
    return 2;
  }
  const Pair& pair = pairs.at(name);
  const auto device = make_cpu_device(threads);
  const double peak = measure_peak_flops(*device, dtype);

  SampleBuilder samples;
  std::mt19937 random(1);
  for (int i = 0; i < pair.batch * (steps + 1); ++i) {
    std::vector<std::int32_t> tokens(std::size_t(pair.sequence_length));
    for (auto& token : tokens) token = std::int32_t(random() % unsigned(pair.student.vocabulary - 64));
    samples.add(tokens, 1);
  }
  const EncodedDataSource data(std::move(samples).finish(), {.shape = {pair.batch, 1, 1}, .shuffle = false});
  const Transformer::Limits limits{.tokens = data.most_tokens(),
                                   .supervised = data.most_supervised(),
                                   .longest = pair.sequence_length,
                                   .trains = true,
                                   .recompute = recompute_named.at(recompute)};
  Transformer::Limits forward_only = limits;
  forward_only.trains = false;
  Transformer student(*device, pair.student, dtype, limits), teacher_model(*device, pair.teacher, dtype, forward_only);
  randomise(*device, student, 1);
  randomise(*device, teacher_model, 2);
  Optimizer optimizer(*device, student.table(), student.values(), {.max_grad_norm = 1});
  TrainerOptions options;
  options.loss.vocabulary = pair.student.vocabulary - 64;
  options.logits_chunk = default_logits_chunk(pair.student.vocabulary, dtype);
  options.save_steps = options.eval_steps = 0;
  Teacher teacher(*device, teacher_model, options.loss.vocabulary, data.most_tokens(), data.most_supervised());
  LocalTeacher source(*device, teacher, dtype, options.logits_chunk);
  Alone alone;
  GradientSync sync(student.table(), student.values(), student.gradients(), {alone, alone}, true, true);
  const auto run = [&](std::int64_t from, std::int64_t to) {
    options.total_steps = to;
    Trainer trainer(*device, student, optimizer, sync, &source, data, nullptr, {alone, alone, alone, alone}, options,
                    {});
    TrainState state;
    state.step = from;
    state.optimizer_updates = from;
    trainer.run(state);
    return std::pair(trainer.times(), time_report(trainer.times(), trainer.steps_run(), *device, peak));
  };
  run(0, 1);  // prepares products and touches memory
  device->reset_op_times();
  const auto [times, report] = run(1, steps + 1);

  const double tokens = double(pair.sequence_length) * pair.batch, seconds = times.total / steps;
  const double work = flops(pair.student, true, tokens, pair.sequence_length) +
                      flops(pair.teacher, false, tokens, pair.sequence_length);
  std::cout << report;
  std::printf(
      "%s %s: %.0f tokens a step, %.3f s, %.0f tokens/s; %.1f GFLOP/s of %.1f for a large product: %.1f %%; peak "
      "memory %.2f GiB\n",
      name.c_str(), name_of(dtype).data(), tokens, seconds, tokens / seconds, work / seconds * 1e-9, peak * 1e-9,
      100 * work / seconds / peak, peak_memory_gib());
  std::printf("activations of the student %.3f GiB\n", double(student.activation_bytes()) / (1 << 30));
}
