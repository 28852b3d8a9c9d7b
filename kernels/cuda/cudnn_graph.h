// The graph API of cuDNN 9 (cudnn_graph.h), as much of it as attention needs. A Graph is data: tensors, and operations
// in the order in which they were added. LibraryGraph hands one to cuDNN. Only a Plan needs a driver.
#pragma once

#include <cudnn_graph.h>

#include <array>
#include <cstdint>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/handle.h"

namespace distill::cuda::cudnn {

using Dims = std::array<std::int64_t, 4>;  // batch, head, row, column
// Of a tensor without gaps.
constexpr Dims packed_strides(const Dims& d) { return {d[1] * d[2] * d[3], d[2] * d[3], d[3], 1}; }
constexpr Dims transposed(const Dims& d) { return {d[0], d[1], d[3], d[2]}; }

// Where a tensor lives: within the kernel that fuses the operations, in device memory, or, a single number, on the
// host.
enum class Place { kernel, device, host };

struct Tensor {
  std::int64_t id = 0;  // 0: no tensor
  cudnnDataType_t type{};
  Dims dims{}, strides{};
  Place place = Place::kernel;
  // The id of the i64 tensor [batch + 1, 1, 1, 1] that says where each batch begins, in elements; the stride of the
  // batch then means nothing. 0: there is none.
  std::int64_t offsets = 0;
};

struct Operation {
  enum class Kind { matmul, reduce, reshape, pointwise };
  Kind kind{};
  std::int64_t y = 0, x = 0, b = 0, t = 0;  // ids; b and t may be missing
  int mode = 0;                             // cudnnPointwiseMode_t, cudnnReduceTensorOp_t
  cudnnDataType_t in = CUDNN_DATA_FLOAT;    // the type of the arithmetic
  int axis = 0;                             // of an index
  std::int64_t m = 0, n = 0, k = 0;         // of a product: ids of what bounds its sizes, batch by batch
  bool zeros_beyond = false;                // elements beyond the bounds are 0, not left as they are
};

class Graph {
 public:
  // The caller's ids, below first_own.
  Tensor in_memory(std::int64_t id, cudnnDataType_t type, const Dims& dims, const Dims& strides,
                   std::int64_t offsets = 0);
  Tensor number(std::int64_t id);  // f32, read from the host when the graph is executed
  Tensor value(cudnnDataType_t type, const Dims& dims) { return value(type, dims, packed_strides(dims)); }
  Tensor value(cudnnDataType_t type, const Dims& dims, const Dims& strides, std::int64_t offsets = 0);

  // c [m, n] = a [m, k] b [k, n] for each batch and head. A head of the one that has fewer serves several.
  struct Bounds {
    Tensor m{}, n{}, k{};
    bool zeros_beyond = false;
  };
  void matmul(const Tensor& c, const Tensor& a, const Tensor& b, const Bounds& bounds);
  // Over the dimensions in which y has fewer elements.
  void reduce(const Tensor& y, const Tensor& x, cudnnReduceTensorOp_t with);
  void reshape(const Tensor& y, const Tensor& x);
  // y = mode(x, b); b may be missing, or have one element where x has many.
  void pointwise(const Tensor& y, cudnnPointwiseMode_t mode, const Tensor& x, const Tensor& b = {},
                 cudnnDataType_t in = CUDNN_DATA_FLOAT);
  // y = where ? x : other
  void select(const Tensor& y, const Tensor& x, const Tensor& other, const Tensor& where);
  // y = the place of each element along the axis.
  void index(const Tensor& y, const Tensor& x, int axis);

  const std::vector<Tensor>& tensors() const { return tensors_; }
  const std::vector<Operation>& operations() const { return operations_; }

 private:
  static constexpr std::int64_t first_own = 1000;
  Tensor keep(const Tensor& tensor);

  std::vector<Tensor> tensors_;
  std::vector<Operation> operations_;
  std::int64_t next_own_ = first_own;
};

// Throws Error (internal) with what was done, the status, cuDNN's own reason and the line of the call.
void check_cudnn(cudnnStatus_t status, const std::string& what,
                 const std::source_location& where = std::source_location::current());

// Any of the library's objects. They are made, given attributes, and finalized; then they can be asked.
class Descriptor {
 public:
  explicit Descriptor(cudnnBackendDescriptorType_t type);
  cudnnBackendDescriptor_t get() const { return handle_.get(); }

  void set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, std::int64_t count, const void* values);
  void set(cudnnBackendAttributeName_t name, std::int64_t value) { set(name, CUDNN_TYPE_INT64, 1, &value); }
  void set(cudnnBackendAttributeName_t name, cudnnDataType_t value) { set(name, CUDNN_TYPE_DATA_TYPE, 1, &value); }
  void set(cudnnBackendAttributeName_t name, cudnnBackendDescriptor_t value) {
    set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value);
  }
  void finalize(const std::string& what);
  std::int64_t number(cudnnBackendAttributeName_t name) const;

 private:
  Handle<cudnnBackendDescriptor_t, &cudnnBackendDestroyDescriptor> handle_;
};

// The GPU that plans are made for: the one of a library handle, or one that a text in cuDNN's JSON describes.
Descriptor device_of(cudnnHandle_t library);
Descriptor described_device(const std::string& json);

class LibraryGraph {
 public:
  // Throws Error where cuDNN refuses an operation or the graph.
  explicit LibraryGraph(const Graph& graph);
  // The configurations of engines that its heuristics propose for the device, best first. None: nothing there supports
  // the graph.
  std::vector<Descriptor> proposals(const Descriptor& device) const;

 private:
  cudnnBackendDescriptor_t tensor(std::int64_t id) const;
  void make_tensor(const Tensor& tensor);
  cudnnBackendDescriptor_t make_operation(const Operation& operation);
  cudnnBackendDescriptor_t keep(Descriptor descriptor);

  std::vector<Descriptor> kept_;
  std::vector<std::pair<std::int64_t, cudnnBackendDescriptor_t>> tensors_;
  Descriptor graph_;
};

// What an execution reads and writes, by the ids of the graph's tensors. Numbers lie on the host.
struct Addresses {
  std::vector<std::int64_t> ids;
  std::vector<void*> pointers;
  void add(std::int64_t id, const void* pointer) {
    ids.push_back(id);
    pointers.push_back(const_cast<void*>(pointer));
  }
};

class Plan {
 public:
  // The first proposal that can be compiled and loaded. Throws Error with the reason why none can.
  Plan(const Graph& graph, const Descriptor& device);
  std::size_t workspace_bytes() const { return workspace_bytes_; }
  void execute(cudnnHandle_t library, const Addresses& addresses, void* workspace) const;

 private:
  // cuDNN does not say that a plan outlives what it was made of.
  LibraryGraph graph_;
  std::vector<Descriptor> proposals_;
  Descriptor plan_;
  std::size_t workspace_bytes_ = 0;
};

}  // namespace distill::cuda::cudnn
