// Matrices in device memory. View and ConstView do not own, Tensor owns; a vector is a matrix of one row.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <ostream>

#include "core/error.h"
#include "core/number.h"

namespace distill {

// rows × cols elements; consecutive rows start `stride` elements apart (stride ≥ cols).
struct ConstView {
  const void* data = nullptr;
  std::int64_t rows = 0, cols = 0, stride = 0;
  DType dtype = DType::f32;

  std::int64_t size() const { return rows * cols; }
  bool contiguous() const { return stride == cols || rows <= 1; }
  bool same_shape(const ConstView& other) const { return rows == other.rows && cols == other.cols; }

  template <class T>
  const T* as() const {
    check(dtype == dtype_of<T>, "view of ", name_of(dtype), " read as ", name_of(dtype_of<T>));
    return static_cast<const T*>(data);
  }
  ConstView row_slice(std::int64_t first, std::int64_t count) const {
    check(first >= 0 && count >= 0 && first + count <= rows, "rows ", first, "+", count, " of ", rows);
    return {static_cast<const char*>(data) + first * stride * std::int64_t(size_of(dtype)), count, cols, stride, dtype};
  }
  ConstView col_slice(std::int64_t first, std::int64_t count) const {
    check(first >= 0 && count >= 0 && first + count <= cols, "columns ", first, "+", count, " of ", cols);
    return {static_cast<const char*>(data) + first * std::int64_t(size_of(dtype)), rows, count, stride, dtype};
  }
};

struct View : ConstView {
  View() = default;
  View(void* memory, std::int64_t row_count, std::int64_t col_count, DType type)
      : ConstView{memory, row_count, col_count, col_count, type} {}
  View(void* memory, std::int64_t row_count, std::int64_t col_count, std::int64_t row_stride, DType type)
      : ConstView{memory, row_count, col_count, row_stride, type} {}

  void* mutable_data() const { return const_cast<void*>(data); }
  template <class T>
  T* as() const {
    return const_cast<T*>(ConstView::as<T>());
  }
  View row_slice(std::int64_t first, std::int64_t count) const { return from(ConstView::row_slice(first, count)); }
  View col_slice(std::int64_t first, std::int64_t count) const { return from(ConstView::col_slice(first, count)); }
  // The same contiguous memory with another shape.
  View reshaped(std::int64_t row_count, std::int64_t col_count) const {
    check(contiguous() && row_count * col_count == size(), "cannot reshape ", rows, "x", cols, " to ", row_count, "x",
          col_count);
    return {mutable_data(), row_count, col_count, dtype};
  }

 private:
  static View from(const ConstView& v) { return {const_cast<void*>(v.data), v.rows, v.cols, v.stride, v.dtype}; }
};

inline std::ostream& operator<<(std::ostream& out, const ConstView& v) {
  return out << name_of(v.dtype) << '[' << v.rows << ',' << v.cols << ']';
}

// Memory of a device; given back when the last owner goes. Made by Device::allocate.
using Buffer = std::unique_ptr<void, std::function<void(void*)>>;

// Owns a contiguous matrix; move-only.
class Tensor {
 public:
  Tensor() = default;
  Tensor(Buffer memory, std::int64_t rows, std::int64_t cols, DType dtype)
      : memory_(std::move(memory)), view_(memory_.get(), rows, cols, dtype) {}
  View view() { return view_; }
  ConstView view() const { return view_; }
  explicit operator bool() const { return memory_ != nullptr; }

 private:
  Buffer memory_;
  View view_;
};

// Calls body(T{}) with the C++ type of a floating-point dtype.
template <class Body>
decltype(auto) with_float_type(DType type, Body&& body) {
  switch (type) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(bf16{});
    case DType::f16:
      return body(f16{});
    case DType::f64:
      return body(double{});
    default:
      fail("no floating-point type: ", name_of(type));
  }
}

}  // namespace distill
