// The way of attention through cuDNN: addresses, packing, scratch, plans that serve several micro-batches, and what is
// left to our own kernels. On the virtual GPU with a stand-in for the library, or on a real one with the library.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <random>
#include <set>

#include "kernels/backends.h"
#include "test/support/gpus.h"
#include "test/support/reference.h"

namespace distill {
namespace {

using reference::Matrix;

struct Case {
  int q_heads, kv_heads, head_dim, window;
  std::vector<std::int32_t> offsets;
};

class Attention {
 public:
  explicit Attention(DType type) : type_(type) {
    test::set_up_gpus();
    device_ = make_cuda_device(
        0, {.library_attention = true, .warn = [this](const std::string& message) { warnings.insert(message); }});
  }
  std::multiset<std::string> warnings;

  // Forward and backward of random numbers; q, k and v are slices of one matrix, with more columns behind them.
  void check(const Case& c) {
    CAPTURE(c.q_heads, c.kv_heads, c.head_dim, c.window, c.offsets);
    const std::int64_t t = c.offsets.back(), nq = std::int64_t(c.q_heads) * c.head_dim,
                       nk = std::int64_t(c.kv_heads) * c.head_dim, all = nq + 2 * nk;
    const AttentionShape shape{c.q_heads, c.kv_heads, c.head_dim, 1 / std::sqrt(float(c.head_dim)), c.window};
    Tensor offsets = device_->tensor(1, std::int64_t(c.offsets.size()), DType::i32);
    device_->upload(offsets.view(), c.offsets.data());
    Segments segments{offsets.view()};
    for (std::size_t s = 0; s + 1 < c.offsets.size(); ++s)
      segments.longest = std::max(segments.longest, c.offsets[s + 1] - c.offsets[s]);

    Tensor qkv = random(t, all + gap), dout = random(t, nq), dqkv = random(t, all + gap);
    Tensor out = device_->tensor(t, nq, type_), log_sum = device_->tensor(t, c.q_heads, wide_type(type_));
    const Matrix untouched = columns(read(dqkv), all, gap);
    const auto slices = [&](const View& v) {
      return std::array<View, 3>{v.col_slice(0, nq), v.col_slice(nq, nk), v.col_slice(nq + nk, nk)};
    };
    const auto [q, k, v] = slices(qkv.view());
    const auto [dq, dk, dv] = slices(dqkv.view());
    device_->attention(out.view(), log_sum.view(), q, k, v, segments, shape);
    device_->attention_backward(dq, dk, dv, dout.view(), q, k, v, out.view(), log_sum.view(), segments, shape);

    const Matrix m = read(qkv), gradients = read(dqkv), mq = columns(m, 0, nq), mk = columns(m, nq, nk),
                 mv = columns(m, nq + nk, nk);
    const reference::Arithmetic arithmetic(type_);
    const reference::AttentionFormula formula(arithmetic, mq, mk, mv, c.offsets, shape);
    const reference::Attention expected = formula.forward();
    check_close("out", read(out), expected.out, type_);
    check_close("log_sum", read(log_sum), expected.log_sum, wide_type(type_));
    const auto derived = formula.backward(read(dout), read(out), read(log_sum));
    check_close("dq", columns(gradients, 0, nq), derived.dq, type_);
    check_close("dk", columns(gradients, nq, nk), derived.dk, type_);
    check_close("dv", columns(gradients, nq + nk, nk), derived.dv, type_);
    const Matrix beyond = columns(gradients, all, gap);
    for (std::size_t i = 0; i < beyond.values.size(); ++i) CHECK(beyond.values[i].value == untouched.values[i].value);
  }

 private:
  static constexpr std::int64_t gap = 8;

  Tensor random(std::int64_t rows, std::int64_t cols) {
    Tensor made = device_->tensor(rows, cols, type_);
    std::normal_distribution<float> normal;
    with_float_type(type_, [&](auto zero) {
      using T = decltype(zero);
      std::vector<T> values;
      for (std::int64_t i = 0; i < rows * cols; ++i) values.push_back(T(Compute<T>(normal(generator_))));
      device_->upload(made.view(), values.data());
    });
    return made;
  }
  Matrix read(const Tensor& tensor) {
    const ConstView v = tensor.view();
    Matrix m(v.rows, v.cols);
    with_float_type(v.dtype, [&](auto zero) {
      using T = decltype(zero);
      std::vector<T> host(m.values.size());
      device_->download(host.data(), v);
      for (std::size_t i = 0; i < host.size(); ++i) m.values[i] = double(Compute<T>(host[i]));
    });
    return m;
  }
  static void check_close(const char* what, const Matrix& found, const Matrix& expected, DType type) {
    for (std::size_t i = 0; i < found.values.size(); ++i) {
      const reference::Number allowed = reference::Arithmetic::kept_as(expected.values[i], type);
      if (!(std::abs(found.values[i].value - allowed.value) <= 2 * allowed.error))
        FAIL(what << ", element " << i << " is " << found.values[i].value << ", expected " << allowed.value
                  << " within " << 2 * allowed.error);
    }
  }

  DType type_;
  std::unique_ptr<Device> device_;
  std::mt19937 generator_{3};
};

TEST_CASE("attention through cuDNN", "[cudnn]") {
  const DType type = GENERATE(DType::bf16, DType::f16);
  Attention attention(type);
  attention.check({4, 2, 8, 0, {0, 1, 20, 20, 41}});
  attention.check({4, 2, 8, 0, {0, 9, 30, 31}});  // the same plan, other sequences
  attention.check({4, 2, 8, 5, {0, 7, 30}});      // a window
  attention.check({2, 2, 8, 0, {0, 7, 30}});      // a key for each query head: gradients go where they belong at once
  CHECK(attention.warnings.empty());
}

TEST_CASE("attention through cuDNN launches nothing of ours but what packs the sequences", "[cudnn][virtual]") {
  Attention attention(DType::bf16);
  const std::uint64_t before = test::gpu_launches();
  attention.check({4, 2, 8, 0, {0, 9, 30, 31}});
  CHECK(test::gpu_launches() - before == 2);  // forward, backward
}

TEST_CASE("attention that cuDNN does not take is ours, and is told once for each direction", "[cudnn]") {
  Attention attention(DType::f32);
  for (int time = 0; time < 2; ++time) attention.check({2, 1, 16, 0, {0, 3, 10}});
  const std::string start = "attn_implementation: sdpa: cuDNN does not take attention of f32, 2/1 heads of 16, ",
                    reason = ": it takes bf16 and f16, not f32; our own attention is used";
  CHECK(attention.warnings == std::multiset<std::string>{start + "backward" + reason, start + "forward" + reason});
}

}  // namespace
}  // namespace distill
