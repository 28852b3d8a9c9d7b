// Attention of packed sequences as graphs of cuDNN, forward and backward, and where the graphs' tensors lie. Numbers
// only: nothing here calls the library.
//
// cuDNN has one operation for all of attention (CUDNN_BACKEND_OPERATION_SDPA_FWD_DESCRIPTOR, _BWD_), but before 9.21 it
// knows no causal mask; so the graphs are the products, masks and sums themselves, in the order in which cuDNN's
// attention kernels recognise them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/cudnn_graph.h"

namespace distill::cuda::cudnn {

struct AttentionOperands {
  ConstView q, k, v, out, log_sum;
  ConstView dout{}, dq{}, dk{}, dv{};  // without data in a forward
  bool are_of_backward() const { return dout.data != nullptr; }
};

// What a graph depends on; scale and addresses are given to each execution.
struct AttentionKey {
  DType dtype{};
  bool is_backward = false;
  // Powers of two that no sequence and no batch exceeds, so that few plans serve all micro-batches.
  std::int64_t sequences = 0, longest = 0;
  int q_heads = 0, kv_heads = 0, head_dim = 0, window = 0;
  // Elements from one row of each operand to the next.
  std::int64_t q = 0, k = 0, v = 0, out = 0, log_sum = 0, dout = 0, dq = 0, dk = 0, dv = 0;
  bool operator==(const AttentionKey&) const = default;

  bool sums_heads() const { return is_backward && q_heads != kv_heads; }
};
struct AttentionKeyHash {
  std::size_t operator()(const AttentionKey& key) const;
};
AttentionKey key_of(const AttentionOperands& operands, const Segments& segments, const AttentionShape& shape);
// "bf16, 32/8 heads of 128, backward"
std::string describe(const AttentionKey& key);
// Why cuDNN cannot take these operands, whatever its version; empty when it can.
std::string problem_with(const AttentionOperands& operands);
// What a user is told of it, or of a plan that cannot be made.
std::string refusal(const AttentionKey& key, const std::string& problem);

// The ids of tensors. Those before id_lengths_of_queries are of operands, whose offsets have ids of their own.
enum Id : std::int64_t {
  id_q = 1,
  id_k,
  id_v,
  id_out,
  id_log_sum,
  id_dout,
  id_dq,
  id_dk,
  id_dv,
  id_lengths_of_queries,
  id_lengths_of_keys,
  // Numbers on the host.
  id_scale,
  id_one,
  id_window,
  id_beyond_lengths,
  id_beyond_diagonal,
  id_beyond_window,
  // Scratch of the backward.
  id_delta,
  id_dq_sum,
  id_dk_of_heads,
  id_dv_of_heads
};
constexpr std::int64_t offsets_of(Id operand) { return 100 + operand; }

Graph attention_graph(const AttentionKey& key);

// The operands in the order of their offsets, and the elements between their rows.
struct RaggedOperand {
  Id id;
  std::int64_t stride;
};
std::vector<RaggedOperand> ragged_operands(const AttentionKey& key);

// Memory that an execution needs beyond operands and cuDNN's workspace, in one piece.
class AttentionMemory {
 public:
  AttentionMemory(const AttentionKey& key, std::int64_t tokens);
  std::size_t bytes() const { return bytes_; }

  // Bytes from the beginning.
  std::size_t lengths = 0;  // i32 [sequences]
  std::size_t offsets = 0;  // i64 [operands, sequences + 1]
  std::size_t delta = 0, dq_sum = 0, dk_of_heads = 0, dv_of_heads = 0;
  std::size_t dk = 0, dv = 0;  // without gaps, where their rows lie in a wider matrix

 private:
  std::size_t take(std::int64_t elements, std::size_t size);
  std::size_t bytes_ = 0;
};

// Numbers that lie on the host while an execution is put on the stream.
struct AttentionNumbers {
  float scale = 0, one = 1, window = 0, beyond = 0;
  explicit AttentionNumbers(const AttentionShape& shape);
};

// Of all tensors of the graph. The operands' dk and dv are those of the key: in `memory` where they are wider there.
Addresses addresses_of(const AttentionKey& key, const AttentionOperands& operands, const AttentionNumbers& numbers,
                       const AttentionMemory& at, void* memory);

}  // namespace distill::cuda::cudnn
