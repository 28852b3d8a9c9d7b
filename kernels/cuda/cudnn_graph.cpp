#include "kernels/cuda/cudnn_graph.h"

#include <algorithm>

#include "core/error.h"

namespace distill::cuda::cudnn {

Tensor Graph::keep(const Tensor& tensor) {
  tensors_.push_back(tensor);
  return tensor;
}

Tensor Graph::in_memory(std::int64_t id, cudnnDataType_t type, const Dims& dims, const Dims& strides,
                        std::int64_t offsets) {
  return keep({id, type, dims, strides, Place::device, offsets});
}

Tensor Graph::number(std::int64_t id) {
  return keep({id, CUDNN_DATA_FLOAT, {1, 1, 1, 1}, {1, 1, 1, 1}, Place::host, 0});
}

Tensor Graph::value(cudnnDataType_t type, const Dims& dims, const Dims& strides, std::int64_t offsets) {
  return keep({next_own_++, type, dims, strides, Place::kernel, offsets});
}

void Graph::matmul(const Tensor& c, const Tensor& a, const Tensor& b, const Bounds& bounds) {
  operations_.push_back({.kind = Operation::Kind::matmul,
                         .y = c.id,
                         .x = a.id,
                         .b = b.id,
                         .m = bounds.m.id,
                         .n = bounds.n.id,
                         .k = bounds.k.id,
                         .zeros_beyond = bounds.zeros_beyond});
}

void Graph::reduce(const Tensor& y, const Tensor& x, cudnnReduceTensorOp_t with) {
  operations_.push_back({.kind = Operation::Kind::reduce, .y = y.id, .x = x.id, .mode = int(with)});
}

void Graph::reshape(const Tensor& y, const Tensor& x) {
  operations_.push_back({.kind = Operation::Kind::reshape, .y = y.id, .x = x.id});
}

void Graph::pointwise(const Tensor& y, cudnnPointwiseMode_t mode, const Tensor& x, const Tensor& b,
                      cudnnDataType_t in) {
  operations_.push_back(
      {.kind = Operation::Kind::pointwise, .y = y.id, .x = x.id, .b = b.id, .mode = int(mode), .in = in});
}

void Graph::select(const Tensor& y, const Tensor& x, const Tensor& other, const Tensor& where) {
  operations_.push_back({.kind = Operation::Kind::pointwise,
                         .y = y.id,
                         .x = x.id,
                         .b = other.id,
                         .t = where.id,
                         .mode = CUDNN_POINTWISE_BINARY_SELECT});
}

void Graph::index(const Tensor& y, const Tensor& x, int axis) {
  operations_.push_back({.kind = Operation::Kind::pointwise,
                         .y = y.id,
                         .x = x.id,
                         .mode = CUDNN_POINTWISE_GEN_INDEX,
                         .in = CUDNN_DATA_INT32,
                         .axis = axis});
}

namespace {

// cuDNN tells a stack of failures, innermost first, a line each: "… Reason: what is wrong".
std::string last_reason() {
  std::array<char, 1024> told{};
  cudnnGetLastErrorString(told.data(), told.size());
  const std::string all = told.data(), mark = "Reason: ";
  const std::size_t at = all.find(mark), begin = at == std::string::npos ? 0 : at + mark.size();
  return all.substr(begin, all.find('\n', begin) - begin);
}

}  // namespace

void check_cudnn(cudnnStatus_t status, const std::string& what, const std::source_location& where) {
  if (status == CUDNN_STATUS_SUCCESS) [[likely]]
    return;
  fail("cuDNN: ", what, ": ", cudnnGetErrorString(status), " (", last_reason(), ") at ", where.file_name(), ":",
       where.line());
}

Descriptor::Descriptor(cudnnBackendDescriptorType_t type) {
  cudnnBackendDescriptor_t made{};
  check_cudnn(cudnnBackendCreateDescriptor(type, &made), text("descriptor of type ", int(type)));
  handle_ = Handle<cudnnBackendDescriptor_t, &cudnnBackendDestroyDescriptor>(made);
}

void Descriptor::set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, std::int64_t count,
                     const void* values) {
  check_cudnn(cudnnBackendSetAttribute(get(), name, type, count, values), text("attribute ", int(name)));
}

void Descriptor::finalize(const std::string& what) { check_cudnn(cudnnBackendFinalize(get()), what); }

std::int64_t Descriptor::number(cudnnBackendAttributeName_t name) const {
  std::int64_t value = 0, count = 0;
  check_cudnn(cudnnBackendGetAttribute(get(), name, CUDNN_TYPE_INT64, 1, &count, &value),
              text("attribute ", int(name)));
  return value;
}

Descriptor device_of(cudnnHandle_t library) {
  Descriptor device(CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR);
  device.set(CUDNN_ATTR_DEVICEPROP_HANDLE, CUDNN_TYPE_HANDLE, 1, &library);
  device.finalize("the GPU's properties");
  return device;
}

Descriptor described_device(const std::string& json) {
  Descriptor device(CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR);
  device.set(CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, std::int64_t(json.size()), json.data());
  device.finalize("the GPU's description");
  return device;
}

namespace {

Descriptor kind_of_matmul(const Operation& operation) {
  Descriptor kind(CUDNN_BACKEND_MATMUL_DESCRIPTOR);
  kind.set(CUDNN_ATTR_MATMUL_COMP_TYPE, operation.in);
  const double zero = 0;
  if (operation.zeros_beyond) kind.set(CUDNN_ATTR_MATMUL_PADDING_VALUE, CUDNN_TYPE_DOUBLE, 1, &zero);
  kind.finalize("a product");
  return kind;
}

Descriptor kind_of_reduction(const Operation& operation) {
  Descriptor kind(CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
  const auto with = cudnnReduceTensorOp_t(operation.mode);
  kind.set(CUDNN_ATTR_REDUCTION_COMP_TYPE, operation.in);
  kind.set(CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &with);
  kind.finalize("a reduction");
  return kind;
}

Descriptor kind_of_pointwise(const Operation& operation) {
  Descriptor kind(CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
  const auto mode = cudnnPointwiseMode_t(operation.mode);
  kind.set(CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
  kind.set(CUDNN_ATTR_POINTWISE_MATH_PREC, operation.in);
  if (mode == CUDNN_POINTWISE_GEN_INDEX) kind.set(CUDNN_ATTR_POINTWISE_AXIS, std::int64_t(operation.axis));
  kind.finalize("an elementwise operation");
  return kind;
}

}  // namespace

LibraryGraph::LibraryGraph(const Graph& graph) : graph_(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR) {
  for (const Tensor& made : graph.tensors()) make_tensor(made);
  std::vector<cudnnBackendDescriptor_t> operations;
  for (const Operation& operation : graph.operations()) operations.push_back(make_operation(operation));
  graph_.set(CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, std::int64_t(operations.size()),
             operations.data());
  graph_.finalize("a graph");
}

cudnnBackendDescriptor_t LibraryGraph::keep(Descriptor descriptor) {
  kept_.push_back(std::move(descriptor));
  return kept_.back().get();
}

cudnnBackendDescriptor_t LibraryGraph::tensor(std::int64_t id) const {
  const auto found = std::find_if(tensors_.begin(), tensors_.end(), [&](const auto& made) { return made.first == id; });
  check(found != tensors_.end(), "tensor ", id, " of a graph is used before it is made");
  return found->second;
}

void LibraryGraph::make_tensor(const Tensor& t) {
  constexpr std::int64_t alignment = 16;  // bytes, of every address
  const bool is_virtual = t.place == Place::kernel, is_by_value = t.place == Place::host;
  Descriptor made(CUDNN_BACKEND_TENSOR_DESCRIPTOR);
  made.set(CUDNN_ATTR_TENSOR_UNIQUE_ID, t.id);
  made.set(CUDNN_ATTR_TENSOR_DATA_TYPE, t.type);
  made.set(CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, t.dims.data());
  made.set(CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, t.strides.data());
  made.set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, alignment);
  made.set(CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &is_virtual);
  made.set(CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &is_by_value);
  if (t.offsets) made.set(CUDNN_ATTR_TENSOR_RAGGED_OFFSET_DESC, tensor(t.offsets));
  made.finalize("a tensor");
  tensors_.emplace_back(t.id, keep(std::move(made)));
}

cudnnBackendDescriptor_t LibraryGraph::make_operation(const Operation& operation) {
  const auto made = [&](cudnnBackendDescriptorType_t type,
                        std::initializer_list<std::pair<cudnnBackendAttributeName_t, std::int64_t>> tensors,
                        const std::pair<cudnnBackendAttributeName_t, cudnnBackendDescriptor_t>& kind) {
    Descriptor d(type);
    for (const auto& [name, id] : tensors)
      if (id) d.set(name, tensor(id));
    if (kind.second) d.set(kind.first, kind.second);
    d.finalize(text("operation ", int(type), ", mode ", operation.mode));
    return keep(std::move(d));
  };
  switch (operation.kind) {
    case Operation::Kind::matmul:
      return made(CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR,
                  {{CUDNN_ATTR_OPERATION_MATMUL_ADESC, operation.x},
                   {CUDNN_ATTR_OPERATION_MATMUL_BDESC, operation.b},
                   {CUDNN_ATTR_OPERATION_MATMUL_CDESC, operation.y},
                   {CUDNN_ATTR_OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC, operation.m},
                   {CUDNN_ATTR_OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC, operation.n},
                   {CUDNN_ATTR_OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC, operation.k}},
                  {CUDNN_ATTR_OPERATION_MATMUL_DESC, keep(kind_of_matmul(operation))});
    case Operation::Kind::reduce:
      return made(
          CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR,
          {{CUDNN_ATTR_OPERATION_REDUCTION_XDESC, operation.x}, {CUDNN_ATTR_OPERATION_REDUCTION_YDESC, operation.y}},
          {CUDNN_ATTR_OPERATION_REDUCTION_DESC, keep(kind_of_reduction(operation))});
    case Operation::Kind::reshape:
      return made(
          CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR,
          {{CUDNN_ATTR_OPERATION_RESHAPE_XDESC, operation.x}, {CUDNN_ATTR_OPERATION_RESHAPE_YDESC, operation.y}}, {});
    case Operation::Kind::pointwise:
      break;
  }
  return made(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR,
              {{CUDNN_ATTR_OPERATION_POINTWISE_XDESC, operation.x},
               {CUDNN_ATTR_OPERATION_POINTWISE_BDESC, operation.b},
               {CUDNN_ATTR_OPERATION_POINTWISE_TDESC, operation.t},
               {CUDNN_ATTR_OPERATION_POINTWISE_YDESC, operation.y}},
              {CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, keep(kind_of_pointwise(operation))});
}

std::vector<Descriptor> LibraryGraph::proposals(const Descriptor& device) const {
  Descriptor heuristics(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
  const cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
  heuristics.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph_.get());
  heuristics.set(CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
  heuristics.set(CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, device.get());
  heuristics.finalize("the heuristics");
  constexpr std::int64_t most = 16;
  std::vector<Descriptor> found;
  std::vector<cudnnBackendDescriptor_t> handles;
  for (std::int64_t i = 0; i < most; ++i) {
    found.emplace_back(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
    handles.push_back(found.back().get());
  }
  std::int64_t count = 0;
  check_cudnn(cudnnBackendGetAttribute(heuristics.get(), CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR,
                                       most, &count, handles.data()),
              "the heuristics' proposals");
  found.erase(found.begin() + std::min(count, most), found.end());
  return found;
}

Plan::Plan(const Graph& graph, const Descriptor& device)
    : graph_(graph), proposals_(graph_.proposals(device)), plan_(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR) {
  if (proposals_.empty()) fail("cuDNN proposes no kernel (", last_reason(), ")");
  for (const Descriptor& proposal : proposals_) {
    plan_ = Descriptor(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
    plan_.set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, proposal.get());
    plan_.set(CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, device.get());
    const cudnnStatus_t status = cudnnBackendFinalize(plan_.get());
    if (status == CUDNN_STATUS_SUCCESS) break;
    if (&proposal == &proposals_.back()) check_cudnn(status, "none of its kernels can be loaded");
  }
  workspace_bytes_ = std::size_t(plan_.number(CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE));
}

void Plan::execute(cudnnHandle_t library, const Addresses& addresses, void* workspace) const {
  Descriptor pack(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
  const auto count = std::int64_t(addresses.ids.size());
  pack.set(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, count, addresses.ids.data());
  pack.set(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, count, addresses.pointers.data());
  pack.set(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
  pack.finalize("addresses");
  check_cudnn(cudnnBackendExecute(library, plan_.get(), pack.get()), "execution");
}

}  // namespace distill::cuda::cudnn
