// What a graph given to cuDNN means, operation by operation: knows nothing of attention, calculates in double. What
// nobody wrote is NaN.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <vector>

#include "core/error.h"
#include "kernels/cuda/cudnn_graph.h"

namespace distill::cuda::cudnn {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

class Interpreter {
 public:
  Interpreter(const std::vector<Tensor>& tensors, const std::vector<Operation>& operations) : operations_(operations) {
    for (const Tensor& t : tensors) tensors_[t.id] = t;
  }

  // Memory, lengths, offsets and numbers, by id.
  std::map<std::int64_t, std::vector<double>> memory;
  // Elements between the rows that the offsets count, by id of the offsets: rows that are n times as long begin n times
  // as far.
  std::map<std::int64_t, std::int64_t> strides_of_offsets;
  std::vector<double> lengths;

  void run() {
    for (const auto& [id, t] : tensors_)
      if (t.place == Place::kernel) memory[id].assign(std::size_t(t.dims[0] * t.dims[1] * t.dims[2] * t.dims[3]), nan);
    for (const Operation& operation : operations_) run(operation);
  }

 private:
  using Index = std::array<std::int64_t, 4>;

  // A tensor of an operation, for one size of the loop over it.
  class Operand {
   public:
    Operand(Interpreter& in, std::int64_t id, const Dims& loop)
        : t_(in.tensors_.at(id)), values_(in.memory.at(in.alias_.count(id) ? in.alias_.at(id) : id)) {
      for (std::size_t d = 0; d < 4; ++d) divisors_[d] = loop[d] / t_.dims[d];
      if (t_.offsets == 0) return;
      tokens_ = t_.dims[3] == 1 || t_.strides[3] == 1 ? 2 : 3;
      const std::int64_t longer = t_.strides[tokens_] / in.strides_of_offsets.at(t_.offsets);
      for (const double offset : in.memory.at(t_.offsets)) begins_.push_back(std::int64_t(offset) * longer);
      lengths_ = &in.lengths;
    }
    // One element stands for all along a dimension, and one head for several.
    double read(Index i) const {
      for (std::size_t d = 0; d < 4; ++d) i[d] /= divisors_[d];
      const double* value = at(i);
      return value ? *value : nan;
    }
    void write(const Index& i, double value) {
      if (double* to = at(i)) *to = value;
    }

   private:
    // Null beyond the end of a sequence.
    double* at(const Index& i) const {
      const std::int64_t place = i[1] * t_.strides[1] + i[2] * t_.strides[2] + i[3] * t_.strides[3];
      if (!lengths_) return &values_.at(std::size_t(place + i[0] * t_.strides[0]));
      if (double(i[tokens_]) >= (*lengths_)[std::size_t(i[0])]) return nullptr;
      return &values_.at(std::size_t(place + begins_[std::size_t(i[0])]));
    }

    const Tensor& t_;
    std::vector<double>& values_;
    Index divisors_{};
    std::size_t tokens_ = 0;  // the dimension that counts them
    std::vector<std::int64_t> begins_;
    const std::vector<double>* lengths_ = nullptr;
  };

  template <class F>
  static void each(const Dims& d, F f) {
    for (std::int64_t b = 0; b < d[0]; ++b)
      for (std::int64_t h = 0; h < d[1]; ++h)
        for (std::int64_t r = 0; r < d[2]; ++r)
          for (std::int64_t c = 0; c < d[3]; ++c) f(Index{b, h, r, c});
  }
  const Dims& dims(std::int64_t id) const { return tensors_.at(id).dims; }
  std::int64_t bound(std::int64_t id, std::int64_t batch, std::int64_t size) const {
    return id ? std::int64_t(memory.at(id).at(std::size_t(batch))) : size;
  }

  void run(const Operation& o) {
    switch (o.kind) {
      case Operation::Kind::matmul:
        return matmul(o);
      case Operation::Kind::reduce:
        return reduce(o);
      case Operation::Kind::reshape:  // the same elements, seen otherwise
        alias_[o.y] = o.x;
        return;
      case Operation::Kind::pointwise:
        return pointwise(o);
    }
  }

  void matmul(const Operation& o) {
    const Dims &d = dims(o.y), &da = dims(o.x), &db = dims(o.b);
    const Operand a(*this, o.x, {d[0], d[1], da[2], da[3]}), b(*this, o.b, {d[0], d[1], db[2], db[3]});
    Operand c(*this, o.y, d);
    for (std::int64_t batch = 0; batch < d[0]; ++batch) {
      const std::int64_t m = bound(o.m, batch, d[2]), n = bound(o.n, batch, d[3]), k = bound(o.k, batch, da[3]);
      each({1, d[1], d[2], d[3]}, [&](Index i) {
        i[0] = batch;
        const bool is_beyond = i[2] >= m || i[3] >= n;
        if (is_beyond && !o.zeros_beyond) return;
        double sum = 0;
        for (std::int64_t l = 0; l < k && !is_beyond; ++l)
          sum += a.read({batch, i[1], i[2], l}) * b.read({batch, i[1], l, i[3]});
        c.write(i, sum);
      });
    }
  }

  void reduce(const Operation& o) {
    const bool is_max = o.mode == CUDNN_REDUCE_TENSOR_MAX;
    const Dims &dx = dims(o.x), &dy = dims(o.y), group{dx[0] / dy[0], dx[1] / dy[1], dx[2] / dy[2], dx[3] / dy[3]};
    const Operand x(*this, o.x, dx);
    Operand y(*this, o.y, dy);
    each(dy, [&](const Index& i) {
      double result = is_max ? -std::numeric_limits<double>::infinity() : 0;
      each(group, [&](const Index& j) {
        const double value =
            x.read({i[0] * group[0] + j[0], i[1] * group[1] + j[1], i[2] * group[2] + j[2], i[3] * group[3] + j[3]});
        result = is_max ? std::max(result, value) : result + value;
      });
      y.write(i, result);
    });
  }

  void pointwise(const Operation& o) {
    const Dims& d = dims(o.y);
    const Operand x(*this, o.x, d), b(*this, o.b ? o.b : o.x, d), t(*this, o.t ? o.t : o.x, d);
    Operand y(*this, o.y, d);
    each(d, [&](const Index& i) {
      y.write(i, o.mode == CUDNN_POINTWISE_GEN_INDEX       ? double(i[std::size_t(o.axis)])
                 : o.mode == CUDNN_POINTWISE_BINARY_SELECT ? (t.read(i) != 0 ? x.read(i) : b.read(i))
                                                           : value_of(o.mode, x.read(i), b.read(i)));
    });
  }

  static double value_of(int mode, double x, double b) {
    switch (mode) {
      case CUDNN_POINTWISE_ADD:
        return x + b;
      case CUDNN_POINTWISE_SUB:
        return x - b;
      case CUDNN_POINTWISE_MUL:
        return x * b;
      case CUDNN_POINTWISE_DIV:
        return x / b;
      case CUDNN_POINTWISE_EXP:
        return std::exp(x);
      case CUDNN_POINTWISE_LOG:
        return std::log(x);
      case CUDNN_POINTWISE_IDENTITY:
        return x;
      case CUDNN_POINTWISE_CMP_LT:
        return x < b;
      case CUDNN_POINTWISE_CMP_GE:
        return x >= b;
      case CUDNN_POINTWISE_CMP_GT:
        return x > b;
      case CUDNN_POINTWISE_LOGICAL_AND:
        return x != 0 && b != 0;
      default:
        fail("the interpreter does not know elementwise operation ", mode);
    }
  }

  std::map<std::int64_t, Tensor> tensors_;
  std::vector<Operation> operations_;
  std::map<std::int64_t, std::int64_t> alias_;
};

}  // namespace distill::cuda::cudnn
