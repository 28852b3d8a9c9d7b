// The hot operations of a distillation step on one device, each against what this machine reaches in the same run: a
// plain copy in the device's memory, and the largest square matrix product (on GPUs cuBLASLt's).
//   gpu_bench cpu|cuda [full|small|tiny]   a table (Markdown); sizes: 8B and 1B models, what a CPU does in a minute,
//   next
//                                          to nothing
//   gpu_bench machine                      driver, runtime, GPUs, who reaches whom (machine.h)
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "kernels/backends.h"
#include "tools/bench/machine.h"

namespace distill::bench {
namespace {

struct Model {
  std::string name;
  std::int64_t hidden, feed_forward, vocabulary;
  int q_heads, kv_heads, head_dim;
};

struct Sizes {
  std::vector<Model> models;
  std::int64_t tokens, sequence;  // of a micro-batch, and of each sequence packed into it
  std::int64_t chunk;             // positions of the loss
  std::int64_t parameters;        // of an update
  std::int64_t copied;            // bytes; beyond the largest cache
  std::vector<std::int64_t> squares;
  double seconds;  // that a timed run takes at least
};

// Llama 3.1 8B and Llama 3.2 1B.
const Model model_8b{"8B", 4096, 14336, 128256, 32, 8, 128}, model_1b{"1B", 2048, 8192, 128256, 32, 8, 64};
const std::map<std::string, Sizes> sizes_named = {
    {"full", {{model_8b, model_1b}, 8192, 2048, 512, 1 << 27, 1 << 29, {4096, 8192, 16384}, 0.05}},
    {"small", {{{"small", 1024, 2816, 32000, 16, 4, 64}}, 512, 256, 64, 1 << 23, 1 << 27, {1024, 2048}, 0.05}},
    {"tiny", {{{"tiny", 64, 96, 500, 4, 2, 64}}, 48, 24, 4, 1 << 12, 1 << 16, {32, 64}, 0}},
};

double seconds_of_run(Device& device, int calls, const std::function<void()>& body) {
  device.synchronize();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) body();
  device.synchronize();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Seconds of one call: the median of five runs of as many calls as take the least time, after one that warms up.
double seconds_of_call(Device& device, double least, const std::function<void()>& body) {
  seconds_of_run(device, 1, body);
  const double once = seconds_of_run(device, 1, body);
  const int calls = int(std::clamp(least / std::max(once, 1e-7), 1.0, 10000.0));
  std::vector<double> runs(5);
  for (double& run : runs) run = seconds_of_run(device, calls, body) / calls;
  std::sort(runs.begin(), runs.end());
  return runs[runs.size() / 2];
}

// Each thread copies its part.
void copy_on_host(int threads, char* to, const char* from, std::size_t bytes) {
  std::vector<std::jthread> others;
  const std::size_t part = bytes / std::size_t(threads) + 1;
  for (std::size_t at = part; at < bytes; at += part)
    others.emplace_back([=] { std::memcpy(to + at, from + at, std::min(part, bytes - at)); });
  std::memcpy(to, from, std::min(part, bytes));
}

class Table {
 public:
  Table(Device& device, const Sizes& sizes) : device_(device), sizes_(sizes), is_gpu_(device.native_stream()) {}

  void print() {
    std::printf("| operation | sizes | µs | rate | share of the ceiling |\n|---|---|---:|---:|---:|\n");
    measure_copies();
    products_in(DType::bf16);
    products_in(DType::f32);
    for (const Model& model : sizes_.models) {
      products_of(model);
      attention_of(model);
      rows_of(model);
    }
    adamw();
    loss(sizes_.models.front());
  }

 private:
  Tensor normal(std::int64_t rows, std::int64_t cols, DType type, float deviation = 1) {
    Tensor x = device_.tensor(rows, cols, type);
    device_.fill_normal(x.view(), 1, ++drawn_, 0, deviation);
    return x;
  }
  double time(const std::function<void()>& body) { return seconds_of_call(device_, sizes_.seconds, body); }

  // rate in G…/s; ceiling the same, 0: it is one.
  static void row(const std::string& operation, const std::string& sizes, double seconds, double rate, const char* unit,
                  double ceiling) {
    std::printf("| %s | %s | %.1f | %.4g %s | ", operation.c_str(), sizes.c_str(), 1e6 * seconds, rate, unit);
    ceiling > 0 ? std::printf("%.1f %% |\n", 100 * rate / ceiling) : std::printf("ceiling |\n");
    std::fflush(stdout);
  }
  void moves(const std::string& operation, const std::string& sizes, double bytes, const std::function<void()>& body) {
    const double seconds = time(body);
    row(operation, sizes, seconds, bytes / seconds / 1e9, "GB/s", copy_rate_);
  }
  void computes(const std::string& operation, const std::string& sizes, double flops, DType type,
                const std::function<void()>& body) {
    const double seconds = time(body);
    row(operation, sizes, seconds, flops / seconds / 1e12, "TFLOP/s", product_rate_.at(type));
  }

  // Within the device's memory, which is read and written, and from the host, which is read.
  void measure_copies() {
    const std::int64_t bytes = sizes_.copied;
    const std::string sizes = text(bytes >> 10, " KiB");
    Tensor from = normal(1, bytes / 2, DType::bf16), to = normal(1, bytes / 2, DType::bf16);
    const auto plain = [&] {
      is_gpu_ ? copy_within(device_, to.view().mutable_data(), from.view().data, std::size_t(bytes))
              : copy_on_host(device_.threads(), static_cast<char*>(to.view().mutable_data()),
                             static_cast<const char*>(from.view().data), std::size_t(bytes));
    };
    const double copying = time(plain);
    copy_rate_ = 2 * double(bytes) / copying / 1e9;
    row("copy in the device's memory", sizes, copying, copy_rate_, "GB/s", 0);
    moves("cast to the same type", sizes, 2 * double(bytes), [&] { device_.cast(to.view(), from.view()); });
    double pinned_rate = copy_rate_;
    if (is_gpu_) {
      const Buffer pinned = pinned_memory(std::size_t(bytes));
      std::memset(pinned.get(), 1, std::size_t(bytes));
      const double pinned_copying =
          time([&] { copy_to_device(device_, to.view().mutable_data(), pinned.get(), std::size_t(bytes)); });
      pinned_rate = double(bytes) / pinned_copying / 1e9;
      row("copy from pinned memory of the host", sizes, pinned_copying, pinned_rate, "GB/s", 0);
    }
    const std::vector<char> host(std::size_t(bytes), 1);
    const double uploading = time([&] { device_.upload(to.view(), host.data()); });
    row("upload", sizes, uploading, double(bytes) / uploading / 1e9, "GB/s", pinned_rate);
  }

  // The best square product is the ceiling of its number format.
  void products_in(DType type) {
    double best = 0;
    for (const std::int64_t n : sizes_.squares) {
      Tensor a = normal(n, n, type), b = normal(n, n, type), c = normal(n, n, type);
      const double seconds = time([&] { device_.gemm(c.view(), a.view(), transposed(b.view())); });
      const double rate = 2.0 * double(n) * double(n) * double(n) / seconds / 1e12;
      row(text("square product, ", name_of(type)), text(n), seconds, rate, "TFLOP/s", 0);
      best = std::max(best, rate);
    }
    product_rate_[type] = best;
  }

  void product(const std::string& what, std::int64_t m, std::int64_t n, std::int64_t k, DType type) {
    Tensor a = normal(m, k, type), b = normal(n, k, type, 0.02f), c = normal(m, n, type);
    computes(text("gemm ", name_of(type), " ", what), text(m, " x ", n, " x ", k),
             2.0 * double(m) * double(n) * double(k), type,
             [&] { device_.gemm(c.view(), a.view(), transposed(b.view())); });
  }
  // dw [n, k] += dyᵀ [m, n] x [m, k] in f32.
  void weight_gradient(const std::string& what, std::int64_t m, std::int64_t n, std::int64_t k) {
    Tensor dy = normal(m, n, DType::bf16), x = normal(m, k, DType::bf16), dw = normal(n, k, DType::f32);
    computes(text("gemm bf16 ", what), text(n, " x ", k, " x ", m), 2.0 * double(m) * double(n) * double(k),
             DType::bf16, [&] { device_.gemm(dw.view(), transposed(dy.view()), x.view(), Write::accumulate); });
  }
  void products_of(const Model& m) {
    const std::int64_t qkv = std::int64_t(m.q_heads + 2 * m.kv_heads) * m.head_dim, t = sizes_.tokens;
    product(m.name + " q, k and v", t, qkv, m.hidden, DType::bf16);
    product(m.name + " gate and up", t, 2 * m.feed_forward, m.hidden, DType::bf16);
    product(m.name + " down", t, m.hidden, m.feed_forward, DType::bf16);
    product(m.name + " head of a chunk", sizes_.chunk, m.vocabulary, m.hidden, DType::bf16);
    weight_gradient(m.name + " gradient of gate and up", t, 2 * m.feed_forward, m.hidden);
    product(m.name + " down", t, m.hidden, m.feed_forward, DType::f32);
  }

  // 4 FLOP a pair of positions and column of a head forward, 10 backward (five products).
  void attention_of(const Model& m) {
    const std::int64_t t = sizes_.tokens, q_cols = m.q_heads * m.head_dim, kv_cols = m.kv_heads * m.head_dim;
    std::vector<std::int32_t> starts;
    for (std::int64_t at = 0; at <= t; at += sizes_.sequence) starts.push_back(std::int32_t(at));
    Tensor offsets = device_.tensor(1, std::int64_t(starts.size()), DType::i32);
    device_.upload(offsets.view(), starts.data());
    const Segments segments{offsets.view(), int(sizes_.sequence)};
    const AttentionShape shape{m.q_heads, m.kv_heads, m.head_dim, 1 / std::sqrt(float(m.head_dim)), 0};
    Tensor q = normal(t, q_cols, DType::bf16), k = normal(t, kv_cols, DType::bf16), v = normal(t, kv_cols, DType::bf16),
           out = normal(t, q_cols, DType::bf16), dout = normal(t, q_cols, DType::bf16),
           dq = normal(t, q_cols, DType::bf16), dk = normal(t, kv_cols, DType::bf16),
           dv = normal(t, kv_cols, DType::bf16), log_sum = device_.tensor(t, m.q_heads, DType::f32);
    const double pairs = double(segments.count()) * double(sizes_.sequence) * double(sizes_.sequence + 1) / 2;
    const std::string sizes = text(segments.count(), " x ", sizes_.sequence, " tokens, ", m.q_heads, "/", m.kv_heads,
                                   " heads of ", m.head_dim);
    computes("attention bf16 " + m.name, sizes, 4 * pairs * double(q_cols), DType::bf16,
             [&] { device_.attention(out.view(), log_sum.view(), q.view(), k.view(), v.view(), segments, shape); });
    computes("attention_backward bf16 " + m.name, sizes, 10 * pairs * double(q_cols), DType::bf16, [&] {
      device_.attention_backward(dq.view(), dk.view(), dv.view(), dout.view(), q.view(), k.view(), v.view(), out.view(),
                                 log_sum.view(), segments, shape);
    });
  }

  // Bytes: every operand once.
  void rows_of(const Model& m) {
    const std::int64_t t = sizes_.tokens, h = m.hidden, f = m.feed_forward;
    {
      Tensor x = normal(t, h, DType::bf16), y = normal(t, h, DType::bf16), dx = normal(t, h, DType::bf16),
             w = normal(1, h, DType::bf16), dw = normal(1, h, DType::f32), inv_rms = device_.tensor(t, 1, DType::f32);
      const std::string sizes = text(t, " x ", h);
      const double matrix = 2.0 * double(t * h);
      moves("rms_norm bf16 " + m.name, sizes, 2 * matrix,
            [&] { device_.rms_norm(y.view(), inv_rms.view(), x.view(), w.view(), 1e-5f); });
      moves("rms_norm_backward bf16 " + m.name, sizes, 3 * matrix,
            [&] { device_.rms_norm_backward(dx.view(), dw.view(), y.view(), x.view(), w.view(), inv_rms.view()); });
    }
    Tensor gate_up = normal(t, 2 * f, DType::bf16), dgate_up = normal(t, 2 * f, DType::bf16),
           y = normal(t, f, DType::bf16);
    const std::string sizes = text(t, " x ", f);
    const double matrix = 2.0 * double(t * f);
    moves("swiglu bf16 " + m.name, sizes, 3 * matrix, [&] { device_.swiglu(y.view(), gate_up.view()); });
    moves("swiglu_backward bf16 " + m.name, sizes, 5 * matrix,
          [&] { device_.swiglu_backward(dgate_up.view(), y.view(), gate_up.view()); });
  }

  // A bf16 parameter is written (2 bytes), its gradient read (4), master and two moments read and written (24).
  void adamw() {
    const std::int64_t n = sizes_.parameters;
    Tensor param = normal(1, n, DType::bf16), master = normal(1, n, DType::f32), m = normal(1, n, DType::f32),
           v = device_.tensor(1, n, DType::f32), grad = normal(1, n, DType::f32);
    device_.zero(v.view());
    AdamWStep step;
    step.lr = 1e-4;
    moves("adamw bf16 with f32 master", text(n, " parameters"), 30 * double(n),
          [&] { device_.adamw(param.view(), master.view(), m.view(), v.view(), grad.view(), step); });
  }

  // Both sides' logits are read twice, because the softmax's sums come first, and the gradient is written.
  void loss(const Model& model) {
    const std::int64_t c = sizes_.chunk, vocabulary = model.vocabulary;
    Tensor student = normal(c, vocabulary, DType::f32, 3), teacher = normal(c, vocabulary, DType::bf16, 3),
           gradient = device_.tensor(c, vocabulary, DType::bf16),
           terms = device_.tensor(c, LossTerms::count, DType::f32), labels = device_.tensor(1, c, DType::i32);
    device_.upload(labels.view(), std::vector<std::int32_t>(std::size_t(c), 7).data());
    LossSpec spec;
    spec.vocabulary = vocabulary;
    moves("distill_loss forward_kl, bf16 teacher", text(c, " x ", vocabulary), 14 * double(c * vocabulary), [&] {
      device_.distill_loss(gradient.view(), terms.view(), student.view(), teacher.view(), labels.view(), spec, 1e-3f);
    });
  }

  Device& device_;
  const Sizes& sizes_;
  bool is_gpu_;
  std::uint64_t drawn_ = 0;
  double copy_rate_ = 0;                  // GB/s
  std::map<DType, double> product_rate_;  // TFLOP/s
};

int run(const std::vector<std::string>& arguments) {
  const std::string device = arguments.empty() ? "" : arguments[0], size = arguments.size() > 1 ? arguments[1] : "full";
  if (device == "machine") {
    std::cout << machine_text();
    return 0;
  }
  check_input((device == "cpu" || device == "cuda") && sizes_named.contains(size) && arguments.size() < 3,
              "expected: gpu_bench cpu|cuda [full|small|tiny], or gpu_bench machine");
  const auto made = device == "cpu" ? make_cpu_device(int(std::thread::hardware_concurrency())) : make_cuda_device(0);
  Table(*made, sizes_named.at(size)).print();
  return 0;
}

}  // namespace
}  // namespace distill::bench

int main(int argc, char** argv) try {
  return distill::bench::run({argv + 1, argv + argc});
} catch (const distill::Error& error) {
  std::cerr << "gpu_bench: " << error.what() << std::endl;
  return int(error.code());
}
