// The graphs of attention that cuDNN is given, without a GPU: what they mean, by an interpreter that knows no
// attention; whether cuDNN has kernels for them on GPUs that are only described to it; and what is said where it has
// none. Runs with the toolkit's stub of the driver, so no plan can be loaded.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <map>
#include <random>
#include <set>

#include "core/error.h"
#include "kernels/cuda/cudnn_attention_graph.h"
#include "test/support/graph_interpreter.h"
#include "test/support/reference.h"
#include "test/support/refusal.h"

namespace distill::cuda::cudnn {
namespace {

using reference::Matrix;

// --- one micro-batch for it

struct Case {
  int q_heads, kv_heads, head_dim, window;
  std::vector<std::int32_t> offsets;

  std::int64_t tokens() const { return offsets.back(); }
  std::int64_t q_cols() const { return std::int64_t(q_heads) * head_dim; }
  std::int64_t kv_cols() const { return std::int64_t(kv_heads) * head_dim; }
  AttentionShape shape() const { return {q_heads, kv_heads, head_dim, 1.5f / std::sqrt(float(head_dim)), window}; }
  Segments segments() const {
    Segments s{{offsets.data(), 1, std::int64_t(offsets.size()), std::int64_t(offsets.size()), DType::i32}};
    for (std::size_t i = 0; i + 1 < offsets.size(); ++i) s.longest = std::max(s.longest, offsets[i + 1] - offsets[i]);
    return s;
  }
};

// The operands of the model: q, k and v are slices of one matrix, and their gradients of another. Addresses are numbers
// that nobody reads.
AttentionOperands operands_of(const Case& c, bool is_backward, DType type = DType::bf16) {
  const std::int64_t t = c.tokens(), row = c.q_cols() + 2 * c.kv_cols();
  const auto view = [&](int matrix, std::int64_t first, std::int64_t cols, std::int64_t stride, DType of) {
    auto* address = reinterpret_cast<char*>(std::uintptr_t(matrix) << 32);
    return ConstView{address + std::size_t(first) * size_of(of), t, cols, stride, of};
  };
  AttentionOperands o;
  o.q = view(1, 0, c.q_cols(), row, type);
  o.k = view(1, c.q_cols(), c.kv_cols(), row, type);
  o.v = view(1, c.q_cols() + c.kv_cols(), c.kv_cols(), row, type);
  o.out = view(2, 0, c.q_cols(), c.q_cols(), type);
  o.log_sum = view(3, 0, c.q_heads, c.q_heads, DType::f32);
  if (!is_backward) return o;
  o.dout = view(4, 0, c.q_cols(), c.q_cols(), type);
  o.dq = view(5, 0, c.q_cols(), row, type);
  o.dk = view(5, c.q_cols(), c.kv_cols(), row, type);
  o.dv = view(5, c.q_cols() + c.kv_cols(), c.kv_cols(), row, type);
  return o;
}

AttentionKey key_for(const Case& c, bool is_backward, DType type = DType::bf16) {
  return key_of(operands_of(c, is_backward, type), c.segments(), c.shape());
}

// An interpreter of the key's graph, with the sequences as a plain double loop lays them out, numbers, and room for
// every operand.
Interpreter interpreter_for(const Case& c, const AttentionKey& key) {
  const Graph graph = attention_graph(key);
  Interpreter interpreter(graph.tensors(), graph.operations());
  interpreter.lengths.assign(std::size_t(key.sequences), 0);
  for (std::size_t s = 0; s + 1 < c.offsets.size(); ++s) interpreter.lengths[s] = c.offsets[s + 1] - c.offsets[s];
  for (const RaggedOperand& operand : ragged_operands(key)) {
    std::vector<double>& offsets = interpreter.memory[offsets_of(operand.id)];
    for (std::int64_t s = 0; s <= key.sequences; ++s)
      offsets.push_back(double(c.offsets[std::min(std::size_t(s), c.offsets.size() - 1)]) * double(operand.stride));
    interpreter.strides_of_offsets[offsets_of(operand.id)] = operand.stride;
    interpreter.memory[operand.id].assign(std::size_t(c.tokens() * operand.stride), nan);
  }
  interpreter.memory[id_lengths_of_queries] = interpreter.memory[id_lengths_of_keys] = interpreter.lengths;
  const AttentionNumbers numbers(c.shape());
  interpreter.memory[id_scale] = {numbers.scale};
  interpreter.memory[id_one] = {numbers.one};
  interpreter.memory[id_window] = {numbers.window};
  for (const Id id : {id_beyond_lengths, id_beyond_diagonal, id_beyond_window})
    interpreter.memory[id] = {numbers.beyond};
  // Elements, not bytes: of f32 scratch there are as many.
  const AttentionMemory at(key, c.tokens());
  interpreter.memory[id_delta].assign((at.dq_sum - at.delta) / sizeof(float), nan);
  interpreter.memory[id_dq_sum].assign(std::size_t(c.tokens() * key.dq), nan);
  interpreter.memory[id_dk_of_heads].assign((at.dv_of_heads - at.dk_of_heads) / sizeof(float), nan);
  interpreter.memory[id_dv_of_heads].assign((at.dk - at.dv_of_heads) / sizeof(float), nan);
  return interpreter;
}

void put(Interpreter& to, Id id, const Matrix& from, std::int64_t stride) {
  for (std::int64_t r = 0; r < from.rows; ++r)
    for (std::int64_t c = 0; c < from.cols; ++c) to.memory.at(id)[std::size_t(r * stride + c)] = from(r, c).value;
}

void check_close(const Interpreter& from, Id id, const Matrix& expected, std::int64_t stride) {
  // Both sides may make the errors of the formula's order of operations, and one rounding more for each step.
  constexpr double sides = 4;
  for (std::int64_t r = 0; r < expected.rows; ++r)
    for (std::int64_t c = 0; c < expected.cols; ++c) {
      const double found = from.memory.at(id)[std::size_t(r * stride + c)];
      if (!(std::abs(found - expected(r, c).value) <= sides * expected(r, c).error))
        FAIL("tensor " << id << " at " << r << ',' << c << ": " << found << ", expected " << expected(r, c).value);
    }
}

TEST_CASE("the graphs mean attention and its gradients", "[cudnn]") {
  const Case c = GENERATE(Case{2, 2, 8, 0, {0, 1, 20, 20, 57}}, Case{4, 2, 8, 0, {0, 13, 14, 40}},
                          Case{3, 1, 8, 0, {0, 130}}, Case{2, 1, 8, 5, {0, 3, 30, 70}});
  CAPTURE(c.q_heads, c.kv_heads, c.head_dim, c.window, c.offsets);
  const reference::Arithmetic arithmetic(DType::f64);
  std::mt19937 random(7);
  const auto normals = [&](std::int64_t rows, std::int64_t cols) {
    std::normal_distribution<double> normal;
    return reference::matrix(rows, cols, [&](auto, auto) { return normal(random); });
  };
  const std::int64_t t = c.tokens();
  const Matrix q = normals(t, c.q_cols()), k = normals(t, c.kv_cols()), v = normals(t, c.kv_cols()),
               dout = normals(t, c.q_cols());
  const reference::AttentionFormula formula(arithmetic, q, k, v, c.offsets, c.shape());
  const reference::Attention expected = formula.forward();

  const AttentionKey forward = key_for(c, false), backward = key_for(c, true);
  Interpreter one = interpreter_for(c, forward);
  put(one, id_q, q, forward.q), put(one, id_k, k, forward.k), put(one, id_v, v, forward.v);
  one.run();
  check_close(one, id_out, expected.out, forward.out);
  check_close(one, id_log_sum, expected.log_sum, forward.log_sum);

  const auto gradients = formula.backward(dout, expected.out, expected.log_sum);
  Interpreter two = interpreter_for(c, backward);
  put(two, id_q, q, backward.q), put(two, id_k, k, backward.k), put(two, id_v, v, backward.v);
  put(two, id_dout, dout, backward.dout), put(two, id_out, expected.out, backward.out);
  put(two, id_log_sum, expected.log_sum, backward.log_sum);
  two.run();
  check_close(two, id_dq, gradients.dq, backward.dq);
  check_close(two, id_dk, gradients.dk, backward.dk);
  check_close(two, id_dv, gradients.dv, backward.dv);
}

// --- plans and memory

TEST_CASE("one plan serves micro-batches of about a size, and nothing else", "[cudnn]") {
  const AttentionKeyHash hash;
  const Case c{4, 2, 16, 0, {0, 100, 240, 500}};
  const AttentionKey key = key_for(c, true);
  CHECK(key.sequences == 4);
  CHECK(key.longest == 512);
  for (const Case& same : {Case{4, 2, 16, 0, {0, 10, 20, 30, 287}}, Case{4, 2, 16, 0, {0, 1, 2, 514}}}) {
    CHECK(key_for(same, true) == key);
    CHECK(hash(key_for(same, true)) == hash(key));
  }
  CHECK(key_for({4, 2, 16, 0, {0, 1}}, true).longest == 128);

  std::vector<AttentionKey> all{key,
                                key_for(c, false),
                                key_for(c, true, DType::f16),
                                key_for({8, 2, 16, 0, c.offsets}, true),
                                key_for({4, 1, 16, 0, c.offsets}, true),
                                key_for({4, 2, 32, 0, c.offsets}, true),
                                key_for({4, 2, 16, 7, c.offsets}, true),
                                key_for({4, 2, 16, 0, {0, 1, 2, 3, 4, 500}}, true),
                                key_for({4, 2, 16, 0, {0, 513, 514, 515}}, true)};
  for (std::int64_t AttentionKey::*stride :
       {&AttentionKey::q, &AttentionKey::k, &AttentionKey::v, &AttentionKey::out, &AttentionKey::log_sum,
        &AttentionKey::dout, &AttentionKey::dq, &AttentionKey::dk, &AttentionKey::dv}) {
    all.push_back(key);
    all.back().*stride += 8;
  }
  for (std::size_t i = 0; i < all.size(); ++i)
    for (std::size_t j = 0; j < i; ++j) {
      CAPTURE(i, j);
      CHECK(!(all[i] == all[j]));
      CHECK(hash(all[i]) != hash(all[j]));
    }
}

TEST_CASE("every tensor of a graph that lies in memory has an address, and no other", "[cudnn]") {
  const Case c =
      GENERATE(Case{4, 2, 16, 0, {0, 100, 240}}, Case{4, 4, 16, 0, {0, 100, 240}}, Case{4, 2, 16, 9, {0, 100, 240}});
  const bool is_backward = GENERATE(false, true);
  const AttentionOperands operands = operands_of(c, is_backward);
  const AttentionKey key = key_for(c, is_backward);
  const AttentionMemory at(key, c.tokens());
  std::vector<char> memory(at.bytes());
  const AttentionNumbers numbers(c.shape());
  const Addresses addresses = addresses_of(key, operands, numbers, at, memory.data());
  std::map<std::int64_t, const void*> found;
  for (std::size_t i = 0; i < addresses.ids.size(); ++i) found[addresses.ids[i]] = addresses.pointers[i];
  CHECK(found.size() == addresses.ids.size());

  std::set<std::int64_t> expected, given;
  const Graph graph = attention_graph(key);
  for (const Tensor& t : graph.tensors())
    if (t.place != Place::kernel) expected.insert(t.id);
  for (const auto& [id, address] : found) given.insert(id);
  CHECK(given == expected);

  CHECK(found.at(id_k) == operands.k.data);
  CHECK(found.at(id_scale) == &numbers.scale);
  const bool is_gathered = c.q_heads != c.kv_heads;
  if (is_backward) CHECK(found.at(id_dv) == (is_gathered ? memory.data() + at.dv : operands.dv.data));

  // What tensors of one stretch of memory take, none reaches into the next: lengths are shared, numbers are apart.
  std::map<const char*, std::size_t> ends;
  for (const Tensor& t : graph.tensors()) {
    const auto* begin = t.place == Place::device ? static_cast<const char*>(found.at(t.id)) : nullptr;
    if (begin < memory.data() || begin >= memory.data() + memory.size()) continue;
    const bool is_wide = t.type == CUDNN_DATA_INT64;
    const std::size_t size = is_wide ? 8 : t.type == CUDNN_DATA_BFLOAT16 ? 2 : 4;
    const std::int64_t rows = t.offsets ? (c.tokens() - 1) * t.strides[2] : (t.dims[0] - 1) * t.strides[0];
    const std::int64_t row = t.offsets ? (t.dims[1] - 1) * t.strides[1] + (t.dims[3] - 1) * t.strides[3] : 0;
    CHECK(reinterpret_cast<std::uintptr_t>(begin) % (is_wide ? 8 : 16) == 0);
    ends[begin] = std::size_t(rows + row + 1) * size;
  }
  const char* free = memory.data();
  for (const auto& [begin, bytes] : ends) {
    CHECK(begin >= free);
    free = begin + bytes;
  }
  CHECK(free <= memory.data() + memory.size());
}

TEST_CASE("operands that cuDNN cannot take", "[cudnn]") {
  const Case c{4, 2, 16, 0, {0, 100}};
  AttentionOperands operands = operands_of(c, true);
  CHECK(problem_with(operands).empty());
  CHECK(problem_with(operands_of(c, true, DType::f16)).empty());
  CHECK(problem_with(operands_of(c, true, DType::f32)) == "it takes bf16 and f16, not f32");
  SECTION("an address") { operands.dk.data = static_cast<const char*>(operands.dk.data) + 8; }
  SECTION("a stride") { operands.q.stride += 4; }
  SECTION("the address of log_sum") { operands.log_sum.data = static_cast<const char*>(operands.log_sum.data) + 4; }
  CHECK(problem_with(operands) == "the rows are not aligned to 16 bytes");
}

// --- cuDNN itself

std::string description(int capability, const char* name, int multiprocessors, int shared_memory, int l2) {
  return text(R"({"deviceVer":)", capability, R"(,"deviceName":")", name, R"(","multiProcessorCount":)",
              multiprocessors, R"(,"maxSharedMemoryPerBlockOptin":)", shared_memory, R"(,"l2CacheSize":)", l2,
              R"(,"driverVer":13000,"cudaDeviceId":0,"pciDeviceId":0,"isTccDriver":0,"supportCoopLaunch":1,)",
              R"("maxGridSize":[2147483647,65535,65535],"maxBlockSize":[1024,1024,64],"maxThreadsPerBlock":1024,)",
              R"("maxThreadsPerSM":2048,"maxCtasPerSM":32,"warpSize":32,"regsPerBlock":65536,)",
              R"("maxRegistersPerSM":65536,"maxSharedMemoryPerBlock":49152,"reservedSharedMemoryPerBlock":1024,)",
              R"("totalGlobalMem":85029158912,"smClockRateKHz":1980000,"memClockRateKHz":2619000})");
}
Descriptor h100() { return described_device(description(900, "NVIDIA H100 80GB HBM3", 132, 232448, 52428800)); }
Descriptor a100() { return described_device(description(800, "NVIDIA A100-SXM4-80GB", 108, 166912, 41943040)); }

TEST_CASE("cuDNN has kernels for the quick start and for models of 8 billion parameters", "[cudnn]") {
  const bool is_backward = GENERATE(false, true);
  const Case c = GENERATE(Case{5, 1, 32, 0, {0, 100, 256}}, Case{4, 2, 64, 0, {0, 100, 256}},  // student, teacher
                          Case{32, 8, 128, 0, {0, 1000, 3048, 8192}},                          // Llama 3, Qwen3
                          Case{32, 8, 128, 4096, {0, 8192}},                                   // Mistral
                          Case{4, 1, 128, 0, {0, 1000, 3048, 8192}});                          // an eighth of the heads
  const AttentionKey key = key_for(c, is_backward, c.head_dim == 64 ? DType::f16 : DType::bf16);
  CAPTURE(describe(key));
  const LibraryGraph graph(attention_graph(key));
  CHECK(!graph.proposals(h100()).empty());
  CHECK(!graph.proposals(a100()).empty());
}

TEST_CASE("what cuDNN has no kernel for is said, with its reason", "[cudnn]") {
  const auto refused = [&](const AttentionKey& key, const Descriptor& device) {
    return refusal(key, test::error_of([&] { Plan(attention_graph(key), device); }).what());
  };
  // Its kernels want heads of a multiple of 8 elements, and their backward no more than 256.
  CHECK(refused(key_for({8, 4, 12, 0, {0, 100}}, false), h100()) ==
        "attn_implementation: sdpa: cuDNN does not take attention of bf16, 8/4 heads of 12, forward: cuDNN proposes no "
        "kernel (Embedding dim per head for q and k is not a multiple of 8 at: d_qk % 8 != 0); our own attention is "
        "used");
  CHECK(refused(key_for({8, 4, 512, 3, {0, 100}}, true), h100()) ==
        "attn_implementation: sdpa: cuDNN does not take attention of bf16, 8/4 heads of 512, window 3, backward: cuDNN "
        "proposes no kernel (Embedding dim per head for q and k is not less than equal to 256 at: d_qk > 256); our own "
        "attention is used");
}

TEST_CASE("a plan needs a driver, and says so", "[cudnn]") {
  const AttentionKey key = key_for({4, 2, 64, 0, {0, 100}}, GENERATE(false, true));
  CHECK_THAT(
      test::refusal(
          "", [&] { Plan(attention_graph(key), h100()); }, ExitCode::internal),
      Catch::StartsWith("cuDNN: none of its kernels can be loaded: CUDNN_STATUS_EXECUTION_FAILED_CUDA_DRIVER ("));
}

TEST_CASE("a graph that uses what it does not have", "[cudnn]") {
  Graph graph;
  const Tensor x = graph.value(CUDNN_DATA_FLOAT, {1, 1, 4, 4});
  graph.pointwise({.id = 5}, CUDNN_POINTWISE_EXP, x);
  CHECK(test::refusal(
            "", [&] { LibraryGraph{graph}; }, ExitCode::internal) == "tensor 5 of a graph is used before it is made");
}

TEST_CASE("a description that is none", "[cudnn]") {
  CHECK_THAT(test::refusal(
                 "", [] { described_device("{"); }, ExitCode::internal),
             Catch::StartsWith("cuDNN: "));
}

}  // namespace
}  // namespace distill::cuda::cudnn
