#include "kernels/cuda/cudnn_attention_graph.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace distill::cuda::cudnn {

namespace {

// One kernel's tile of queries; shorter sequences cost as much.
constexpr std::int64_t shortest = 128;

std::int64_t power_of_two(std::int64_t n) { return std::int64_t(std::bit_ceil(std::uint64_t(n))); }

}  // namespace

AttentionKey key_of(const AttentionOperands& o, const Segments& segments, const AttentionShape& shape) {
  AttentionKey key{.dtype = o.q.dtype,
                   .is_backward = o.are_of_backward(),
                   .sequences = power_of_two(segments.count()),
                   .longest = power_of_two(std::max<std::int64_t>(segments.longest, shortest)),
                   .q_heads = shape.q_heads,
                   .kv_heads = shape.kv_heads,
                   .head_dim = shape.head_dim,
                   .window = shape.window,
                   .q = o.q.stride,
                   .k = o.k.stride,
                   .v = o.v.stride,
                   .out = o.out.stride,
                   .log_sum = o.log_sum.stride};
  if (!key.is_backward) return key;
  key.dout = o.dout.stride, key.dq = o.dq.stride;
  // What is kept for each query head has rows that much longer, so gaps would be multiplied too.
  key.dk = key.sums_heads() ? o.dk.cols : o.dk.stride, key.dv = key.sums_heads() ? o.dv.cols : o.dv.stride;
  return key;
}

std::size_t AttentionKeyHash::operator()(const AttentionKey& key) const {
  std::size_t hash = 0;
  for (const std::int64_t part :
       {std::int64_t(key.dtype) | std::int64_t(key.is_backward) << 8, key.sequences, key.longest,
        std::int64_t(key.q_heads) << 32 | key.kv_heads, std::int64_t(key.head_dim) << 32 | key.window, key.q, key.k,
        key.v, key.out, key.log_sum, key.dout, key.dq, key.dk, key.dv})
    hash = (hash ^ std::size_t(part)) * 0x9e3779b97f4a7c15u, hash ^= hash >> 32;
  return hash;
}

std::string describe(const AttentionKey& key) {
  return text(name_of(key.dtype), ", ", key.q_heads, "/", key.kv_heads, " heads of ", key.head_dim,
              key.window ? text(", window ", key.window) : "", key.is_backward ? ", backward" : ", forward");
}

std::string problem_with(const AttentionOperands& o) {
  constexpr std::uintptr_t alignment = 16;
  if (o.q.dtype != DType::bf16 && o.q.dtype != DType::f16)
    return text("it takes bf16 and f16, not ", name_of(o.q.dtype));
  std::uintptr_t bits = reinterpret_cast<std::uintptr_t>(o.log_sum.data);
  for (const ConstView* view : {&o.q, &o.k, &o.v, &o.out, &o.dout, &o.dq, &o.dk, &o.dv})
    bits |= reinterpret_cast<std::uintptr_t>(view->data) | std::uintptr_t(view->stride) * size_of(o.q.dtype);
  return bits % alignment ? "the rows are not aligned to 16 bytes" : "";
}

std::string refusal(const AttentionKey& key, const std::string& problem) {
  return text("attn_implementation: sdpa: cuDNN does not take attention of ", describe(key), ": ", problem,
              "; our own attention is used");
}

namespace {

class Builder {
 public:
  explicit Builder(const AttentionKey& key)
      : key_(key),
        lengths_of_queries_(lengths(id_lengths_of_queries)),
        lengths_of_keys_(lengths(id_lengths_of_keys)),
        scale_(graph_.number(id_scale)) {}

  Graph forward();
  Graph backward();

 private:
  cudnnDataType_t type() const { return key_.dtype == DType::bf16 ? CUDNN_DATA_BFLOAT16 : CUDNN_DATA_HALF; }
  Dims scores() const { return {key_.sequences, key_.q_heads, key_.longest, key_.longest}; }
  Dims rows_of_scores() const { return {key_.sequences, key_.q_heads, key_.longest, 1}; }
  Tensor score(cudnnDataType_t type = CUDNN_DATA_FLOAT) { return graph_.value(type, scores()); }

  Tensor lengths(Id id) { return graph_.in_memory(id, CUDNN_DATA_INT32, {key_.sequences, 1, 1, 1}, {1, 1, 1, 1}); }
  std::int64_t offsets(Id id) {
    return graph_.in_memory(offsets_of(id), CUDNN_DATA_INT64, {key_.sequences + 1, 1, 1, 1}, {1, 1, 1, 1}).id;
  }
  // [sequences, heads, longest, head size], rows `stride` elements apart.
  Tensor operand(Id id, int heads, std::int64_t stride) {
    return graph_.in_memory(id, type(), {key_.sequences, heads, key_.longest, key_.head_dim},
                            {key_.longest * stride, key_.head_dim, stride, 1}, offsets(id));
  }
  Tensor transposed_operand(Id id, int heads, std::int64_t stride) {
    return graph_.in_memory(id, type(), {key_.sequences, heads, key_.head_dim, key_.longest},
                            {key_.longest * stride, key_.head_dim, 1, stride}, offsets(id));
  }
  Tensor log_sum() {
    return graph_.in_memory(id_log_sum, CUDNN_DATA_FLOAT, rows_of_scores(),
                            {key_.longest * key_.log_sum, 1, key_.log_sum, 1}, offsets(id_log_sum));
  }

  Tensor scaled(const Tensor& x) {
    const Tensor y = score();
    graph_.pointwise(y, CUDNN_POINTWISE_MUL, x, scale_);
    return y;
  }
  // −∞ elsewhere. Each use has a number of its own, as cuDNN's kernels expect.
  Tensor only(const Tensor& x, const Tensor& where, Id id) {
    const Tensor y = score();
    graph_.select(y, x, graph_.number(id), where);
    return y;
  }
  Tensor index(const Tensor& x, int axis) {
    const Tensor y = score(CUDNN_DATA_INT32);
    graph_.index(y, x, axis);
    return y;
  }
  Tensor compare(const Tensor& x, cudnnPointwiseMode_t mode, const Tensor& y) {
    const Tensor holds = score(CUDNN_DATA_BOOLEAN);
    graph_.pointwise(holds, mode, x, y, CUDNN_DATA_BOOLEAN);
    return holds;
  }
  Tensor within_lengths(const Tensor& x);
  Tensor within_diagonal(const Tensor& x);
  Tensor softmax(const Tensor& x);
  Tensor delta(const Tensor& dout, const Tensor& out, const Tensor& like);
  void gradient_of_keys(Id id, Id id_of_heads, std::int64_t stride, const Tensor& weights, const Tensor& rows);

  const AttentionKey& key_;
  Graph graph_;
  Tensor lengths_of_queries_, lengths_of_keys_, scale_;
};

Tensor Builder::within_lengths(const Tensor& x) {
  const Tensor row = index(x, 2), column = index(x, 3);
  const Tensor is_query = compare(row, CUDNN_POINTWISE_CMP_LT, lengths_of_queries_);
  const Tensor is_key = compare(column, CUDNN_POINTWISE_CMP_LT, lengths_of_keys_);
  return only(x, compare(is_query, CUDNN_POINTWISE_LOGICAL_AND, is_key), id_beyond_lengths);
}

// Query t sees key j where t ≥ j and, with a window, j + window > t.
Tensor Builder::within_diagonal(const Tensor& x) {
  const Tensor row = index(x, 2), column = index(x, 3);
  const Tensor causal = only(x, compare(row, CUDNN_POINTWISE_CMP_GE, column), id_beyond_diagonal);
  if (key_.window == 0) return causal;
  const Tensor again = index(causal, 2), key = index(causal, 3), end = score();
  graph_.pointwise(end, CUDNN_POINTWISE_ADD, key, graph_.number(id_window));
  return only(causal, compare(end, CUDNN_POINTWISE_CMP_GT, again), id_beyond_window);
}

// Also writes log_sum = max + log Σ exp(x − max).
Tensor Builder::softmax(const Tensor& x) {
  const auto row = [&] { return graph_.value(CUDNN_DATA_FLOAT, rows_of_scores()); };
  const Tensor largest = row(), less = score(), powers = score(), sum = row(), logarithm = row();
  graph_.reduce(largest, x, CUDNN_REDUCE_TENSOR_MAX);
  graph_.pointwise(less, CUDNN_POINTWISE_SUB, x, largest);
  graph_.pointwise(powers, CUDNN_POINTWISE_EXP, less);
  graph_.reduce(sum, powers, CUDNN_REDUCE_TENSOR_ADD);
  graph_.pointwise(logarithm, CUDNN_POINTWISE_LOG, sum);
  graph_.pointwise(log_sum(), CUDNN_POINTWISE_ADD, largest, logarithm);
  const Tensor probabilities = score(type());  // the product with v takes its type
  graph_.pointwise(probabilities, CUDNN_POINTWISE_DIV, powers, sum);
  return probabilities;
}

Graph Builder::forward() {
  const Tensor q = operand(id_q, key_.q_heads, key_.q), k = transposed_operand(id_k, key_.kv_heads, key_.k),
               v = operand(id_v, key_.kv_heads, key_.v), out = operand(id_out, key_.q_heads, key_.out), raw = score();
  graph_.matmul(raw, q, k, {.m = lengths_of_queries_, .n = lengths_of_keys_, .zeros_beyond = true});
  const Tensor p = softmax(within_diagonal(within_lengths(scaled(raw))));
  graph_.matmul(out, p, v, {.m = lengths_of_queries_, .k = lengths_of_keys_});
  return std::move(graph_);
}

// Σ dout · out of each row, in memory as `like` is.
Tensor Builder::delta(const Tensor& dout, const Tensor& out, const Tensor& like) {
  const Tensor products = graph_.value(CUDNN_DATA_FLOAT, dout.dims), sums = graph_.value(CUDNN_DATA_FLOAT, like.dims);
  const Tensor kept = graph_.in_memory(id_delta, CUDNN_DATA_FLOAT, like.dims, like.strides, like.offsets);
  graph_.pointwise(products, CUDNN_POINTWISE_MUL, dout, out);
  graph_.reduce(sums, products, CUDNN_REDUCE_TENSOR_ADD);
  graph_.pointwise(kept, CUDNN_POINTWISE_MUL, sums, graph_.number(id_one));
  return kept;
}

// dk or dv = weightsᵀ rows, summed over the query heads of each key.
void Builder::gradient_of_keys(Id id, Id id_of_heads, std::int64_t stride, const Tensor& weights, const Tensor& rows) {
  const Tensor gradient = operand(id, key_.kv_heads, stride);
  const Tensor left = graph_.value(type(), transposed(weights.dims), transposed(weights.strides));
  const Graph::Bounds bounds{.m = lengths_of_keys_, .k = lengths_of_queries_};
  graph_.reshape(left, weights);
  if (!key_.sums_heads()) return graph_.matmul(gradient, left, rows, bounds);
  // With the offsets of the gradient, which cuDNN multiplies by the query heads of a key as it finds these strides.
  const std::int64_t wide = stride * (key_.q_heads / key_.kv_heads);
  const Tensor of_heads =
      graph_.in_memory(id_of_heads, type(), {key_.sequences, key_.q_heads, key_.longest, key_.head_dim},
                       {key_.longest * wide, key_.head_dim, wide, 1}, gradient.offsets);
  graph_.matmul(of_heads, left, rows, bounds);
  graph_.reduce(gradient, of_heads, CUDNN_REDUCE_TENSOR_ADD);
}

// P = exp(S − log_sum), dV = Pᵀ dO, dP = dO Vᵀ, dS = scale · P ∘ (dP − delta), dK = dSᵀ Q, dQ = dS K.
Graph Builder::backward() {
  const Graph::Bounds of_scores{.m = lengths_of_queries_, .n = lengths_of_keys_};
  const Tensor q = operand(id_q, key_.q_heads, key_.q), k = transposed_operand(id_k, key_.kv_heads, key_.k),
               v = transposed_operand(id_v, key_.kv_heads, key_.v), out = operand(id_out, key_.q_heads, key_.out),
               dout = operand(id_dout, key_.q_heads, key_.dout), sums = log_sum(), product = delta(dout, out, sums);
  const Tensor raw = score(), less = score(), p = score();
  graph_.matmul(raw, q, k, of_scores);
  graph_.pointwise(less, CUDNN_POINTWISE_SUB, scaled(raw), sums);
  graph_.pointwise(p, CUDNN_POINTWISE_EXP, within_diagonal(within_lengths(less)));
  gradient_of_keys(id_dv, id_dv_of_heads, key_.dv, p, dout);

  const Tensor dp = score(), dp_less = score(), weighted = score();
  graph_.matmul(dp, dout, v, of_scores);
  graph_.pointwise(dp_less, CUDNN_POINTWISE_SUB, dp, product);
  graph_.pointwise(weighted, CUDNN_POINTWISE_MUL, dp_less, p);
  const Tensor ds = scaled(weighted);
  gradient_of_keys(id_dk, id_dk_of_heads, key_.dk, ds, q);

  const Tensor keys = graph_.value(type(), transposed(k.dims), transposed(k.strides), k.offsets);
  const Tensor dq = operand(id_dq, key_.q_heads, key_.dq);
  const Tensor dq_sum = graph_.in_memory(id_dq_sum, CUDNN_DATA_FLOAT, dq.dims, dq.strides, dq.offsets);
  graph_.reshape(keys, k);
  graph_.matmul(dq_sum, ds, keys, {.m = lengths_of_queries_, .k = lengths_of_keys_});
  graph_.pointwise(dq, CUDNN_POINTWISE_IDENTITY, dq_sum);
  return std::move(graph_);
}

}  // namespace

Graph attention_graph(const AttentionKey& key) {
  Builder builder(key);
  return key.is_backward ? builder.backward() : builder.forward();
}

std::vector<RaggedOperand> ragged_operands(const AttentionKey& key) {
  std::vector<RaggedOperand> all{
      {id_q, key.q}, {id_k, key.k}, {id_v, key.v}, {id_out, key.out}, {id_log_sum, key.log_sum}};
  if (key.is_backward) all.insert(all.end(), {{id_dout, key.dout}, {id_dq, key.dq}, {id_dk, key.dk}, {id_dv, key.dv}});
  return all;
}

std::size_t AttentionMemory::take(std::int64_t elements, std::size_t size) {
  constexpr std::size_t alignment = 256;
  const std::size_t at = bytes_;
  bytes_ += (std::size_t(elements) * size + alignment - 1) / alignment * alignment;
  return at;
}

AttentionMemory::AttentionMemory(const AttentionKey& key, std::int64_t tokens) {
  lengths = take(key.sequences, sizeof(std::int32_t));
  offsets = take(std::int64_t(ragged_operands(key).size()) * (key.sequences + 1), sizeof(std::int64_t));
  if (!key.is_backward) return;
  delta = take(tokens * key.log_sum, sizeof(float));
  dq_sum = take(tokens * key.dq, sizeof(float));
  if (!key.sums_heads()) return;
  // cuDNN's own frontend reserves them as f32, though the graph keeps them in the type of the operands.
  const std::int64_t group = key.q_heads / key.kv_heads;
  dk_of_heads = take(tokens * key.dk * group, sizeof(float));
  dv_of_heads = take(tokens * key.dv * group, sizeof(float));
  dk = take(tokens * key.dk, size_of(key.dtype));
  dv = take(tokens * key.dv, size_of(key.dtype));
}

AttentionNumbers::AttentionNumbers(const AttentionShape& shape)
    : scale(shape.scale), window(float(shape.window)), beyond(-std::numeric_limits<float>::infinity()) {}

Addresses addresses_of(const AttentionKey& key, const AttentionOperands& o, const AttentionNumbers& numbers,
                       const AttentionMemory& at, void* memory) {
  const auto part = [&](std::size_t offset) { return static_cast<char*>(memory) + offset; };
  Addresses all;
  const auto ragged = ragged_operands(key);
  for (std::size_t i = 0; i < ragged.size(); ++i)
    all.add(offsets_of(ragged[i].id), part(at.offsets + i * std::size_t(key.sequences + 1) * sizeof(std::int64_t)));
  all.add(id_lengths_of_queries, part(at.lengths));
  all.add(id_lengths_of_keys, part(at.lengths));
  all.add(id_q, o.q.data);
  all.add(id_k, o.k.data);
  all.add(id_v, o.v.data);
  all.add(id_out, o.out.data);
  all.add(id_log_sum, o.log_sum.data);
  all.add(id_scale, &numbers.scale);
  for (const Id id : {id_beyond_lengths, id_beyond_diagonal}) all.add(id, &numbers.beyond);
  if (key.window > 0) {
    all.add(id_window, &numbers.window);
    all.add(id_beyond_window, &numbers.beyond);
  }
  if (!key.is_backward) return all;
  all.add(id_one, &numbers.one);
  all.add(id_dout, o.dout.data);
  all.add(id_dq, o.dq.data);
  all.add(id_delta, part(at.delta));
  all.add(id_dq_sum, part(at.dq_sum));
  all.add(id_dk, key.dk == o.dk.stride ? o.dk.data : part(at.dk));
  all.add(id_dv, key.dv == o.dv.stride ? o.dv.data : part(at.dv));
  if (!key.sums_heads()) return all;
  all.add(id_dk_of_heads, part(at.dk_of_heads));
  all.add(id_dv_of_heads, part(at.dv_of_heads));
  return all;
}

}  // namespace distill::cuda::cudnn
