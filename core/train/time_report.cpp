#include "core/train/time_report.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "core/error.h"

namespace distill {

double measure_peak_flops(Device& device, DType dtype) {
  constexpr std::int64_t n = 1024;
  constexpr int repetitions = 4;
  Tensor a = device.tensor(n, n, dtype), b = device.tensor(n, n, dtype), c = device.tensor(n, n, dtype);
  device.fill_normal(a.view(), 1, 1, 0, 1.0f);
  device.fill_normal(b.view(), 1, 2, 0, 1.0f);
  double best = 0;
  for (int i = 0; i <= repetitions; ++i) {  // the first one prepares the product
    device.synchronize();
    const auto start = std::chrono::steady_clock::now();
    device.gemm(c.view(), a.view(), transposed(b.view()));
    device.synchronize();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (i > 0) best = std::max(best, 2.0 * n * n * n / seconds);
  }
  device.reset_op_times();
  return best;
}

namespace {

template <class... Value>
std::string format(const char* pattern, Value... value) {
  char line[200];
  std::snprintf(line, sizeof line, pattern, value...);
  return line;
}

}  // namespace

std::string time_report(const StepTimes& times, std::int64_t steps, const Device& device, double peak_flops) {
  if (steps == 0 || times.total <= 0) return "no step was run\n";
  std::string out = format("where the time went: %lld steps, %.3f s per step\n", static_cast<long long>(steps),
                           times.total / double(steps));
  const double known = times.data + times.teacher + times.pipeline + times.forward + times.loss + times.backward +
                       times.reduce + times.optimizer;
  const std::pair<const char*, double> phases[] = {
      {"data", times.data},           {"teacher wait", times.teacher}, {"pipeline wait", times.pipeline},
      {"forward", times.forward},     {"head and loss", times.loss},   {"backward", times.backward},
      {"gradient sum", times.reduce}, {"optimizer", times.optimizer},  {"other", times.total - known}};
  for (const auto& [name, seconds] : phases)
    out += format("  %-18s %9.3f s  %5.1f %%\n", name, seconds, 100 * seconds / times.total);
  out += format("beside the steps: validation %.3f s, checkpoints %.3f s", times.validation, times.checkpoint);
  if (times.student_wait > 0) out += format("; the teacher waited %.3f s for the student", times.student_wait);
  out += '\n';

  if (device.native_stream())
    return out + text("operations on ", device.name(), " are not timed one by one: a profiler shows them\n");

  std::vector<std::pair<std::string, OpTime>> ops(device.op_times().begin(), device.op_times().end());
  std::sort(ops.begin(), ops.end(), [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
  double sum = 0;
  for (const auto& [name, op] : ops) sum += op.seconds;
  out += format("by operation on %s (%d threads), validation included: %.3f s\n", device.name().c_str(),
                device.threads(), sum);
  for (const auto& [name, op] : ops) {
    if (op.seconds < 0.002 * sum) continue;
    out += format("  %-18s %9.3f s  %5.1f %%  %9lld calls", name.c_str(), op.seconds, 100 * op.seconds / sum,
                  static_cast<long long>(op.calls));
    if (op.flops > 0) {
      out += format("  %7.1f GFLOP/s", op.flops / op.seconds * 1e-9);
      if (peak_flops > 0) out += format(" (%.0f %% of a large product's)", 100 * op.flops / op.seconds / peak_flops);
    }
    out += '\n';
  }
  return out;
}

}  // namespace distill
