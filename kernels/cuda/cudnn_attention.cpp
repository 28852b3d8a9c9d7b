#include <cudnn.h>

#include <unordered_map>

#include "kernels/cuda/cudnn_attention_graph.h"
#include "kernels/cuda/library_attention.h"
#include "kernels/cuda/sequence_packing.h"

namespace distill::cuda {

namespace {

using namespace cudnn;

using Library = Handle<cudnnHandle_t, &cudnnDestroy>;

// Sizes are rounded to powers of two and a model has one shape, so there are few.
constexpr std::size_t most_plans = 256;

std::string version(std::size_t v) { return text(v / 10000, ".", v / 100 % 100, ".", v % 100); }

class CudnnAttention final : public LibraryAttention {
 public:
  CudnnAttention(std::shared_ptr<MemoryUse> use, const std::string& device, Library library, cudaStream_t stream,
                 Warn warn)
      : library_(std::move(library)),
        device_(device_of(library_.get())),
        stream_(stream),
        warn_(std::move(warn)),
        scratch_(std::move(use), device) {
    check_cudnn(cudnnSetStream(library_.get(), stream), "the stream");
  }

  bool forward(const AttentionCall& call, View out, View log_sum) override {
    return run(call, {.q = call.q, .k = call.k, .v = call.v, .out = out, .log_sum = log_sum});
  }

  bool backward(const AttentionCall& call, View dq, View dk, View dv, const ConstView& dout, const ConstView& out,
                const ConstView& log_sum) override {
    return run(call, {.q = call.q,
                      .k = call.k,
                      .v = call.v,
                      .out = out,
                      .log_sum = log_sum,
                      .dout = dout,
                      .dq = dq,
                      .dk = dk,
                      .dv = dv});
  }

 private:
  bool run(const AttentionCall& call, const AttentionOperands& operands);
  // Null where cuDNN has none.
  const Plan* plan_of(const AttentionKey& key);
  std::unique_ptr<Plan> make_plan(const AttentionKey& key);
  void warn(const AttentionKey& key, const std::string& problem);
  void pack(const AttentionKey& key, const Segments& segments, const AttentionMemory& at, char* memory) const;
  // From the memory where they lie without gaps.
  void spread(const ConstView& to, const void* from) const;

  Library library_;
  Descriptor device_;
  cudaStream_t stream_;
  Warn warn_;
  DeviceScratch scratch_;
  bool has_warned_[2] = {false, false};  // forward, backward
  std::unordered_map<AttentionKey, std::unique_ptr<Plan>, AttentionKeyHash> plans_;
};

void CudnnAttention::warn(const AttentionKey& key, const std::string& problem) {
  if (!std::exchange(has_warned_[key.is_backward], true)) warn_(refusal(key, problem));
}

std::unique_ptr<Plan> CudnnAttention::make_plan(const AttentionKey& key) {
  try {
    return std::make_unique<Plan>(attention_graph(key), device_);
  } catch (const Error& error) {
    warn(key, error.what());
    return nullptr;
  }
}

const Plan* CudnnAttention::plan_of(const AttentionKey& key) {
  const auto known = plans_.find(key);
  if (known != plans_.end()) return known->second.get();
  if (plans_.size() >= most_plans) {
    cuda_check(cudaStreamSynchronize(stream_));  // some may not have run yet
    plans_.clear();
  }
  return plans_.emplace(key, make_plan(key)).first->second.get();
}

void CudnnAttention::pack(const AttentionKey& key, const Segments& segments, const AttentionMemory& at,
                          char* memory) const {
  PackedSequences to;
  to.sequences = key.sequences;
  for (const RaggedOperand& operand : ragged_operands(key)) to.strides[std::size_t(to.operands++)] = operand.stride;
  to.lengths = reinterpret_cast<std::int32_t*>(memory + at.lengths);
  to.offsets = reinterpret_cast<std::int64_t*>(memory + at.offsets);
  pack_sequences(to, segments, stream_);
}

void CudnnAttention::spread(const ConstView& to, const void* from) const {
  const std::size_t size = size_of(to.dtype), row = std::size_t(to.cols) * size;
  cuda_check(cudaMemcpy2DAsync(const_cast<void*>(to.data), std::size_t(to.stride) * size, from, row, row,
                               std::size_t(to.rows), cudaMemcpyDeviceToDevice, stream_));
}

bool CudnnAttention::run(const AttentionCall& call, const AttentionOperands& operands) {
  const AttentionKey key = key_of(operands, call.segments, call.shape);
  if (const std::string problem = problem_with(operands); !problem.empty()) {
    warn(key, problem);
    return false;
  }
  const Plan* const plan = plan_of(key);
  if (!plan) return false;
  const AttentionMemory at(key, call.q.rows);
  char* const memory = static_cast<char*>(scratch_.bytes(at.bytes() + plan->workspace_bytes()));
  pack(key, call.segments, at, memory);
  const AttentionNumbers numbers(call.shape);
  plan->execute(library_.get(), addresses_of(key, operands, numbers, at, memory), memory + at.bytes());
  if (key.is_backward && key.dk != operands.dk.stride) spread(operands.dk, memory + at.dk);
  if (key.is_backward && key.dv != operands.dv.stride) spread(operands.dv, memory + at.dv);
  return true;
}

// Why the installed library or the GPU cannot be used; empty where they can.
std::string problem_here() {
  constexpr std::size_t oldest = 91801;
  const std::size_t installed = cudnnGetVersion();
  if (installed < oldest)
    return text("cuDNN ", version(installed), " is installed, expected at least ", version(oldest));
  int gpu = 0, major = 0;
  cuda_check(cudaGetDevice(&gpu));
  cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, gpu));
  // Elsewhere its backward wants log_sum filled up to the longest sequence, in another order than ours.
  if (major != 9 && major != 10)
    return text("cuDNN's attention of packed sequences is for GPUs of compute capability 9 and 10, this one has ", major);
  return "";
}

Library start_library() {
  cudnnHandle_t library{};
  check_cudnn(cudnnCreate(&library), "start");
  return Library(library);
}

}  // namespace

std::unique_ptr<LibraryAttention> make_library_attention(std::shared_ptr<MemoryUse> use, const std::string& device,
                                                         cudaStream_t stream, const Warn& warn) {
  std::string problem = problem_here();
  try {
    if (problem.empty())
      return std::make_unique<CudnnAttention>(std::move(use), device, start_library(), stream, warn);
  } catch (const Error& error) {
    problem = error.what();
  }
  warn(text("attn_implementation: sdpa: ", problem, "; our own attention is used"));
  return nullptr;
}

std::string cudnn_version() { return text("cuDNN ", version(cudnnGetVersion())); }

}  // namespace distill::cuda
