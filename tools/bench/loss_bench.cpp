// Time of Device::distill_loss per vocabulary entry, beside the head's three matrix products for the same positions.
// loss_bench [threads] [positions] [ranks]; vocabulary 151,936, hidden size 896, bf16 teacher and gradient. With more
// than one rank the loss is timed with the vocabulary cut over so many, which are threads of their own.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "core/model/vocabulary.h"
#include "kernels/backends.h"
#include "parallel/parallel.h"

namespace distill {
namespace {

double best_seconds(const std::function<void()>& body, int repeats = 5) {
  double best = 1e9;
  for (int i = 0; i <= repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    body();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (i > 0) best = std::min(best, seconds);
  }
  return best;
}

int run(int threads, std::int64_t positions, int ranks) {
  constexpr std::int64_t vocabulary = 151936, hidden = 896;
  const auto device = make_cpu_device(threads);
  const auto normal = [&](std::int64_t rows, std::int64_t cols, DType type, std::uint64_t seed, float deviation) {
    Tensor x = device->tensor(rows, cols, type);
    device->fill_normal(x.view(), 1, seed, 0, deviation);
    return x;
  };
  Tensor student = normal(positions, vocabulary, DType::f32, 1, 3),
         teacher = normal(positions, vocabulary, DType::bf16, 2, 3);
  Tensor gradient = device->tensor(positions, vocabulary, DType::bf16);
  Tensor labels = device->tensor(1, positions, DType::i32);
  for (std::int64_t r = 0; r < positions; ++r) labels.view().as<std::int32_t>()[r] = std::int32_t(r * 97 % 1000);

  Tensor head = normal(vocabulary, hidden, DType::bf16, 3, 0.02f),
         states = normal(positions, hidden, DType::bf16, 4, 1);
  Tensor head_gradient = device->tensor(vocabulary, hidden, DType::f32);
  Tensor state_gradient = device->tensor(positions, hidden, DType::bf16);
  device->zero(head_gradient.view());
  device->zero(gradient.view());
  Tensor logits = device->tensor(positions, vocabulary, DType::f32);
  const double products = best_seconds([&] {
    device->gemm(logits.view(), states.view(), transposed(head.view()));
    device->gemm(head_gradient.view(), transposed(gradient.view()), states.view(), Write::accumulate);
    device->gemm(state_gradient.view(), gradient.view(), head.view());
  });
  const double entries = double(positions * vocabulary);
  std::printf("%d threads, %lld positions: head products %.1f ms, %.0f GFLOP/s, %.3f ns per entry\n", threads,
              (long long)positions, 1e3 * products, 6 * entries * hidden / products / 1e9, 1e9 * products / entries);

  struct Case {
    const char* what;
    float temperature;
    int topk;
    TopkMode mode;
  };
  for (const Case& c :
       {Case{"", 1, 0, {}}, Case{" temperature 2", 2, 0, {}}, Case{" top-64 renormalize", 1, 64, TopkMode::renormalize},
        Case{" top-1024 tail", 1, 1024, TopkMode::tail}}) {
    for (std::size_t o = 0; o < objective_names.size(); ++o) {
      LossSpec spec;
      spec.objective = Objective(o);
      spec.vocabulary = 151665;
      spec.temperature = c.temperature;
      spec.topk = c.topk;
      spec.topk_mode = c.mode;
      double seconds = 0;
      run_ranks(ranks, [&](Communicator& group) {
        const auto mine = make_cpu_device(threads);
        const VocabularyPart part = vocabulary_part(spec.vocabulary, vocabulary, ranks, group.rank());
        const auto here = [&](Tensor& x) { return x.view().col_slice(part.first, part.rows); };
        Tensor my_terms = mine->tensor(positions, LossTerms::count, DType::f32);
        const double best = best_seconds([&] {
          mine->distill_loss(here(gradient), my_terms.view(), here(student), here(teacher), labels.view(), spec, 1e-3f,
                             {part.first, &group});
          group.barrier();
        });
        if (group.rank() == 0) seconds = best;
      });
      std::printf("%-18s%-20s %.3f ns per entry, %4.1f%% of the products\n", std::string(objective_names[o]).c_str(),
                  c.what, 1e9 * seconds / entries, 100 * seconds / products);
    }
  }
  return 0;
}

}  // namespace
}  // namespace distill

int main(int argc, char** argv) {
  return distill::run(argc > 1 ? std::atoi(argv[1]) : 2, argc > 2 ? std::atoi(argv[2]) : 256,
                      argc > 3 ? std::atoi(argv[3]) : 1);
}
