// Stands for libcudnn in the test of what drives it, on the virtual GPU: descriptors are kept as they are given, and a
// plan is executed by the interpreter of graphs. Its device has one engine for every graph.
#include <cudnn.h>

#include <cstring>
#include <memory>
#include <stdexcept>

#include "core/number.h"
#include "kernels/cuda/check.h"
#include "test/support/graph_interpreter.h"

namespace {

using namespace distill;
using namespace distill::cuda;
using namespace distill::cuda::cudnn;

struct Object {
  int type = 0;
  std::map<int, std::vector<char>> attributes;

  template <class T>
  std::vector<T> all(int name) const {
    const auto found = attributes.find(name);
    if (found == attributes.end()) return {};
    std::vector<T> values(found->second.size() / sizeof(T));
    std::memcpy(values.data(), found->second.data(), found->second.size());
    return values;
  }
  template <class T>
  T one(int name) const {
    T value{};
    const auto found = attributes.find(name);
    if (found != attributes.end()) std::memcpy(&value, found->second.data(), sizeof value);
    return value;
  }
  const Object* object(int name) const { return one<const Object*>(name); }
  std::int64_t id(int name) const {
    const Object* tensor = object(name);
    return tensor ? tensor->one<std::int64_t>(CUDNN_ATTR_TENSOR_UNIQUE_ID) : 0;
  }
};

struct FakeLibrary {
  cudaStream_t stream = nullptr;
};

std::size_t size_of_attribute(cudnnBackendAttributeType_t type) {
  switch (type) {
    case CUDNN_TYPE_BOOLEAN:
      return sizeof(bool);
    case CUDNN_TYPE_CHAR:
      return 1;
    case CUDNN_TYPE_INT64:
    case CUDNN_TYPE_DOUBLE:
    case CUDNN_TYPE_VOID_PTR:
    case CUDNN_TYPE_HANDLE:
    case CUDNN_TYPE_BACKEND_DESCRIPTOR:
      return 8;
    default:
      return sizeof(int);  // enumerations
  }
}

Dims dims_of(const Object& tensor, int name) {
  Dims dims{};
  std::memcpy(dims.data(), tensor.attributes.at(name).data(), sizeof dims);
  return dims;
}

Tensor tensor_of(const Object& o) {
  const bool is_virtual = o.one<bool>(CUDNN_ATTR_TENSOR_IS_VIRTUAL),
             is_by_value = o.one<bool>(CUDNN_ATTR_TENSOR_IS_BY_VALUE);
  return {o.one<std::int64_t>(CUDNN_ATTR_TENSOR_UNIQUE_ID),
          o.one<cudnnDataType_t>(CUDNN_ATTR_TENSOR_DATA_TYPE),
          dims_of(o, CUDNN_ATTR_TENSOR_DIMENSIONS),
          dims_of(o, CUDNN_ATTR_TENSOR_STRIDES),
          is_by_value  ? Place::host
          : is_virtual ? Place::kernel
                       : Place::device,
          o.id(CUDNN_ATTR_TENSOR_RAGGED_OFFSET_DESC)};
}

Operation operation_of(const Object& o) {
  Operation made;
  switch (o.type) {
    case CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR:
      made.kind = Operation::Kind::matmul;
      made.x = o.id(CUDNN_ATTR_OPERATION_MATMUL_ADESC);
      made.b = o.id(CUDNN_ATTR_OPERATION_MATMUL_BDESC);
      made.y = o.id(CUDNN_ATTR_OPERATION_MATMUL_CDESC);
      made.m = o.id(CUDNN_ATTR_OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC);
      made.n = o.id(CUDNN_ATTR_OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC);
      made.k = o.id(CUDNN_ATTR_OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC);
      made.zeros_beyond =
          o.object(CUDNN_ATTR_OPERATION_MATMUL_DESC)->attributes.count(CUDNN_ATTR_MATMUL_PADDING_VALUE) != 0;
      return made;
    case CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR:
      made.kind = Operation::Kind::reduce;
      made.x = o.id(CUDNN_ATTR_OPERATION_REDUCTION_XDESC);
      made.y = o.id(CUDNN_ATTR_OPERATION_REDUCTION_YDESC);
      made.mode = o.object(CUDNN_ATTR_OPERATION_REDUCTION_DESC)->one<int>(CUDNN_ATTR_REDUCTION_OPERATOR);
      return made;
    case CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR:
      made.kind = Operation::Kind::reshape;
      made.x = o.id(CUDNN_ATTR_OPERATION_RESHAPE_XDESC);
      made.y = o.id(CUDNN_ATTR_OPERATION_RESHAPE_YDESC);
      return made;
    default:
      made.kind = Operation::Kind::pointwise;
      made.x = o.id(CUDNN_ATTR_OPERATION_POINTWISE_XDESC);
      made.b = o.id(CUDNN_ATTR_OPERATION_POINTWISE_BDESC);
      made.t = o.id(CUDNN_ATTR_OPERATION_POINTWISE_TDESC);
      made.y = o.id(CUDNN_ATTR_OPERATION_POINTWISE_YDESC);
      made.mode = o.object(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR)->one<int>(CUDNN_ATTR_POINTWISE_MODE);
      made.axis =
          int(o.object(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR)->one<std::int64_t>(CUDNN_ATTR_POINTWISE_AXIS));
      return made;
  }
}

// All tensors that an operation names, and those that these name.
void collect(const Object& o, std::map<std::int64_t, Tensor>& into) {
  for (const auto& [name, bytes] : o.attributes) {
    const bool is_tensor =
        (name >= CUDNN_ATTR_OPERATION_POINTWISE_XDESC && name <= CUDNN_ATTR_OPERATION_POINTWISE_TDESC) ||
        (name >= CUDNN_ATTR_OPERATION_MATMUL_ADESC && name <= CUDNN_ATTR_OPERATION_MATMUL_CDESC) ||
        (name >= CUDNN_ATTR_OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC &&
         name <= CUDNN_ATTR_OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC) ||
        name == CUDNN_ATTR_OPERATION_REDUCTION_XDESC || name == CUDNN_ATTR_OPERATION_REDUCTION_YDESC ||
        name == CUDNN_ATTR_OPERATION_RESHAPE_XDESC || name == CUDNN_ATTR_OPERATION_RESHAPE_YDESC ||
        name == CUDNN_ATTR_TENSOR_RAGGED_OFFSET_DESC;
    if (!is_tensor) continue;
    const Object& tensor = *o.object(name);
    const Tensor made = tensor_of(tensor);
    into.emplace(made.id, made);
    collect(tensor, into);
  }
}

// --- device memory as doubles

std::size_t size_of(cudnnDataType_t type) {
  switch (type) {
    case CUDNN_DATA_INT64:
      return 8;
    case CUDNN_DATA_BFLOAT16:
    case CUDNN_DATA_HALF:
      return 2;
    default:
      return 4;
  }
}
template <class T>
T as(const char* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}
double number_at(const char* bytes, cudnnDataType_t type) {
  switch (type) {
    case CUDNN_DATA_INT64:
      return double(as<std::int64_t>(bytes));
    case CUDNN_DATA_INT32:
      return double(as<std::int32_t>(bytes));
    case CUDNN_DATA_BFLOAT16:
      return double(float(as<bf16>(bytes)));
    case CUDNN_DATA_HALF:
      return double(float(as<f16>(bytes)));
    default:
      return double(as<float>(bytes));
  }
}
void put_number(char* bytes, cudnnDataType_t type, double value) {
  const bf16 b(static_cast<float>(value));
  const f16 h(static_cast<float>(value));
  const float f = float(value);
  if (type == CUDNN_DATA_BFLOAT16) std::memcpy(bytes, &b, sizeof b);
  if (type == CUDNN_DATA_HALF) std::memcpy(bytes, &h, sizeof h);
  if (type == CUDNN_DATA_FLOAT) std::memcpy(bytes, &f, sizeof f);
}

class Execution {
 public:
  Execution(const Object& graph, const Object& pack) {
    std::map<std::int64_t, Tensor> by_id;
    for (const Object* operation : graph.all<const Object*>(CUDNN_ATTR_OPERATIONGRAPH_OPS)) {
      collect(*operation, by_id);
      operations_.push_back(operation_of(*operation));
    }
    for (const auto& [id, tensor] : by_id) tensors_.push_back(tensor);
    const auto ids = pack.all<std::int64_t>(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS);
    const auto pointers = pack.all<char*>(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS);
    for (std::size_t i = 0; i < ids.size(); ++i) addresses_[ids[i]] = pointers.at(i);
  }

  void run() {
    Interpreter interpreter(tensors_, operations_);
    for (const Tensor& t : tensors_)
      if (t.place == Place::host) interpreter.memory[t.id] = {double(as<float>(addresses_.at(t.id)))};
    for (const Tensor& t : tensors_)  // the offsets of others, and lengths
      if (t.place == Place::device && t.offsets == 0) interpreter.memory[t.id] = load(t, t.dims[0]);
    for (const Operation& operation : operations_)
      if (operation.kind == Operation::Kind::matmul) interpreter.lengths = interpreter.memory.at(operation.m);
    // The operand with the shortest rows is the one that the offsets count.
    for (const Tensor& t : tensors_)
      if (t.offsets) {
        std::int64_t& stride = interpreter.strides_of_offsets[t.offsets];
        if (stride == 0 || row_of(t) < stride) stride = row_of(t);
      }
    for (const Tensor& t : tensors_)
      if (t.place == Place::device && t.offsets)
        interpreter.memory[t.id] =
            load(t, extent(t, interpreter.memory.at(t.offsets).back(), interpreter.strides_of_offsets.at(t.offsets)));
    const auto before = interpreter.memory;
    interpreter.run();
    for (const Operation& operation : operations_)
      for (const Tensor& t : tensors_)
        if (t.id == operation.y && t.place == Place::device) store(t, before.at(t.id), interpreter.memory.at(t.id));
  }

 private:
  static std::int64_t row_of(const Tensor& t) {
    return t.dims[3] == 1 || t.strides[3] == 1 ? t.strides[2] : t.strides[3];
  }
  // Elements from the first of the first token to the last of the last.
  static std::int64_t extent(const Tensor& t, double end, std::int64_t counted) {
    const std::int64_t tokens = std::int64_t(end) / counted;
    return (tokens - 1) * row_of(t) + t.dims[1] * t.strides[1];
  }
  std::vector<char> bytes_of(const Tensor& t, std::size_t count) const {
    std::vector<char> bytes(count * size_of(t.type));
    cuda_check(cudaMemcpy(bytes.data(), addresses_.at(t.id), bytes.size(), cudaMemcpyDeviceToHost));
    return bytes;
  }
  std::vector<double> load(const Tensor& t, std::int64_t count) const {
    const std::vector<char> bytes = bytes_of(t, std::size_t(count));
    std::vector<double> values;
    for (std::size_t at = 0; at < bytes.size(); at += size_of(t.type))
      values.push_back(number_at(bytes.data() + at, t.type));
    return values;
  }
  // Only what changed: the rows of others may lie between.
  void store(const Tensor& t, const std::vector<double>& before, const std::vector<double>& after) const {
    std::vector<char> bytes = bytes_of(t, after.size());
    for (std::size_t i = 0; i < after.size(); ++i)
      if (std::memcmp(&before[i], &after[i], sizeof(double)) != 0)
        put_number(bytes.data() + i * size_of(t.type), t.type, after[i]);
    cuda_check(cudaMemcpy(addresses_.at(t.id), bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  }

  std::vector<Tensor> tensors_;
  std::vector<Operation> operations_;
  std::map<std::int64_t, char*> addresses_;
};

Object& object_of(cudnnBackendDescriptor_t descriptor) { return *static_cast<Object*>(descriptor); }

}  // namespace

extern "C" {

std::size_t cudnnGetVersion() { return CUDNN_VERSION; }
const char* cudnnGetErrorString(cudnnStatus_t) { return "a status"; }
void cudnnGetLastErrorString(char* message, std::size_t) { *message = 0; }
cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) {
  *handle = reinterpret_cast<cudnnHandle_t>(new FakeLibrary);
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnDestroy(cudnnHandle_t handle) {
  delete reinterpret_cast<FakeLibrary*>(handle);
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
  reinterpret_cast<FakeLibrary*>(handle)->stream = stream;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t* descriptor) {
  *descriptor = new Object{int(type), {}};
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
  delete &object_of(descriptor);
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t) { return CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, std::int64_t count, const void* values) {
  const char* begin = static_cast<const char*>(values);
  object_of(descriptor).attributes[int(name)].assign(begin, begin + std::size_t(count) * size_of_attribute(type));
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t, std::int64_t, std::int64_t* count, void* values) {
  *count = 1;
  if (name == CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE) {
    *static_cast<std::int64_t*>(values) = 1000;
    return CUDNN_STATUS_SUCCESS;
  }
  if (name != CUDNN_ATTR_ENGINEHEUR_RESULTS) return CUDNN_STATUS_BAD_PARAM;
  Object& configuration = object_of(*static_cast<cudnnBackendDescriptor_t*>(values));
  configuration.attributes[CUDNN_ATTR_ENGINECFG_ENGINE] =
      object_of(descriptor).attributes.at(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH);
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t pack) {
  cuda_check(cudaStreamSynchronize(reinterpret_cast<FakeLibrary*>(handle)->stream));
  const Object& configuration = *object_of(plan).object(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG);
  Execution(*configuration.object(CUDNN_ATTR_ENGINECFG_ENGINE), object_of(pack)).run();
  cuda_check(cudaDeviceSynchronize());  // copies from memory that is not pinned may return before they are done
  return CUDNN_STATUS_SUCCESS;
}
}
