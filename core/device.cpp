#include "core/device.h"

#include <algorithm>

#include "core/communicator.h"

namespace distill {

namespace {

bool is_vector(const ConstView& v, std::int64_t n, DType type) { return v.rows == 1 && v.cols == n && v.dtype == type; }

}  // namespace

Device::Zone::Zone(Device& device, std::string_view op, double flops)
    : time_([&]() -> OpTime& {
        const auto found = device.op_times_.find(op);
        return found != device.op_times_.end() ? found->second : device.op_times_[std::string(op)];
      }()),
      start_(std::chrono::steady_clock::now()) {
  time_.flops += flops;
  ++time_.calls;
}

Device::Zone::~Zone() {
  time_.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

void Device::zero(View x) {
  const Zone zone(*this, "zero");
  do_zero(x);
}

void Device::cast(View to, const ConstView& from) {
  check(to.same_shape(from), "cast: ", to, " from ", from);
  const Zone zone(*this, "cast");
  do_cast(to, from);
}

void Device::add(View sum, const ConstView& a, const ConstView& b) {
  check(sum.same_shape(a) && sum.same_shape(b) && sum.dtype == a.dtype && sum.dtype == b.dtype, "add: ", sum, " = ", a,
        " + ", b);
  const Zone zone(*this, "add");
  do_add(sum, a, b);
}

void Device::add_bias(View x, const ConstView& bias) {
  check(is_vector(bias, x.cols, x.dtype), "add_bias: ", x, " += ", bias);
  const Zone zone(*this, "add_bias");
  do_add_bias(x, bias);
}

void Device::gather_rows(View out, const ConstView& x, const ConstView& rows) {
  check(is_vector(rows, out.rows, DType::i32) && out.cols == x.cols && out.dtype == x.dtype, "gather_rows: ", out,
        " from ", x, " at ", rows);
  const Zone zone(*this, "gather_rows");
  do_gather_rows(out, x, rows);
}

void Device::scatter_rows(View out, const ConstView& x, const ConstView& rows) {
  check(is_vector(rows, x.rows, DType::i32) && out.cols == x.cols && out.dtype == x.dtype, "scatter_rows: ", out,
        " from ", x, " at ", rows);
  const Zone zone(*this, "scatter_rows");
  do_scatter_rows(out, x, rows);
}

void Device::fill_normal(View x, std::uint64_t seed, std::uint64_t tensor, std::int64_t first, float std) {
  const Zone zone(*this, "fill_normal");
  do_fill_normal(x, seed, tensor, first, std);
}

void Device::column_sums(View sums, const ConstView& x) {
  check(sums.rows == 1 && sums.cols == x.cols && (sums.dtype == wide_type(x.dtype) || sums.dtype == DType::f64),
        "column_sums: ", sums, " of ", x);
  const Zone zone(*this, "column_sums");
  do_column_sums(sums, x);
}

void Device::sum_of_squares(View sum, const ConstView& x) {
  check(is_vector(sum, 1, DType::f64), "sum_of_squares: ", sum, " of ", x);
  const Zone zone(*this, "sum_of_squares");
  do_sum_of_squares(sum, x);
}

void Device::gemm(View c, const Factor& a, const Factor& b, Write write) {
  check(c.rows == a.rows() && c.cols == b.cols() && a.cols() == b.rows() && a.matrix.dtype == b.matrix.dtype &&
            (c.dtype == a.matrix.dtype || c.dtype == wide_type(a.matrix.dtype)),
        "gemm: ", c, " = ", a.matrix, a.is_transposed ? "ᵀ " : " ", b.matrix, b.is_transposed ? "ᵀ" : "");
  const Zone zone(*this, "gemm", 2.0 * double(c.rows) * double(c.cols) * double(a.cols()));
  if (c.size() == 0) return;
  if (a.cols() == 0) {
    if (write == Write::overwrite) do_zero(c);
    return;
  }
  do_gemm(c, a, b, write);
}

void Device::embedding(View out, const ConstView& table, const ConstView& ids, std::int32_t first_id) {
  check(is_vector(ids, out.rows, DType::i32) && out.cols == table.cols && out.dtype == table.dtype, "embedding: ", out,
        " from ", table, " at ", ids);
  const Zone zone(*this, "embedding");
  do_embedding(out, table, ids, first_id);
}

void Device::embedding_backward(View dtable, const ConstView& dout, const ConstView& ids, std::int32_t first_id) {
  check(is_vector(ids, dout.rows, DType::i32) && dout.cols == dtable.cols && dtable.dtype == wide_type(dout.dtype),
        "embedding_backward: ", dtable, " += ", dout, " at ", ids);
  const Zone zone(*this, "embedding_backward");
  do_embedding_backward(dtable, dout, ids, first_id);
}

namespace {

void check_norm(const char* op, const ConstView& y, const ConstView& x, const ConstView& w, const ConstView& inv_rms) {
  check(y.same_shape(x) && y.dtype == x.dtype && w.rows == 1 && w.dtype == x.dtype && w.cols > 0 &&
            x.cols % w.cols == 0 && inv_rms.rows == x.rows && inv_rms.cols == x.cols / w.cols &&
            inv_rms.dtype == wide_type(x.dtype),
        op, ": x ", x, " w ", w, " inv_rms ", inv_rms, " y ", y);
}

}  // namespace

void Device::rms_norm(View y, View inv_rms, const ConstView& x, const ConstView& w, float eps) {
  check_norm("rms_norm", y, x, w, inv_rms);
  const Zone zone(*this, "rms_norm");
  do_rms_norm(y, inv_rms, x, w, eps);
}

void Device::rms_norm_backward(View dx, View dw, const ConstView& dy, const ConstView& x, const ConstView& w,
                               const ConstView& inv_rms) {
  check_norm("rms_norm_backward", dx, x, w, inv_rms);
  check(dy.same_shape(x) && dy.dtype == x.dtype && is_vector(dw, w.cols, wide_type(x.dtype)), "rms_norm_backward: dy ",
        dy, " dw ", dw);
  const Zone zone(*this, "rms_norm_backward");
  do_rms_norm_backward(dx, dw, dy, x, w, inv_rms);
}

void Device::add_rms_norm(View sum, View y, View inv_rms, const ConstView& x, const ConstView& delta,
                          const ConstView& w, float eps) {
  check_norm("add_rms_norm", y, x, w, inv_rms);
  check(sum.same_shape(x) && delta.same_shape(x) && sum.dtype == x.dtype && delta.dtype == x.dtype,
        "add_rms_norm: sum ", sum, " x ", x, " delta ", delta);
  const Zone zone(*this, "rms_norm");
  do_add_rms_norm(sum, y, inv_rms, x, delta, w, eps);
}

void Device::rms_norm_backward_add(View dx, View dw, const ConstView& dy, const ConstView& dskip, const ConstView& x,
                                   const ConstView& w, const ConstView& inv_rms) {
  check_norm("rms_norm_backward_add", dx, x, w, inv_rms);
  check(dy.same_shape(x) && dy.dtype == x.dtype && dskip.same_shape(x) && dskip.dtype == x.dtype &&
            is_vector(dw, w.cols, wide_type(x.dtype)),
        "rms_norm_backward_add: dy ", dy, " dskip ", dskip, " dw ", dw);
  const Zone zone(*this, "rms_norm_backward");
  do_rms_norm_backward_add(dx, dw, dy, dskip, x, w, inv_rms);
}

void Device::plain_add_rms_norm(View sum, View y, View inv_rms, const ConstView& x, const ConstView& delta,
                                const ConstView& w, float eps) {
  do_add(sum, x, delta);
  do_rms_norm(y, inv_rms, sum, w, eps);
}

void Device::plain_rms_norm_backward_add(View dx, View dw, const ConstView& dy, const ConstView& dskip,
                                         const ConstView& x, const ConstView& w, const ConstView& inv_rms) {
  do_rms_norm_backward(dx, dw, dy, x, w, inv_rms);
  do_add(dx, dx, dskip);
}

void Device::rope(View x, const ConstView& positions, const ConstView& table, int head_dim, bool inverse) {
  check(head_dim > 0 && head_dim % 2 == 0 && x.cols % head_dim == 0 && is_vector(positions, x.rows, DType::i32) &&
            table.cols == head_dim && table.dtype == wide_type(x.dtype),
        "rope: x ", x, " head size ", head_dim, " positions ", positions, " table ", table);
  const Zone zone(*this, "rope");
  do_rope(x, positions, table, head_dim, inverse);
}

namespace {

void check_attention(const char* op, const ConstView& out, const ConstView& log_sum, const ConstView& q,
                     const ConstView& k, const ConstView& v, const Segments& segments, const AttentionShape& s) {
  const auto tokens = q.rows;
  check(s.q_heads > 0 && s.kv_heads > 0 && s.q_heads % s.kv_heads == 0 && s.head_dim > 0 &&
            q.cols == std::int64_t(s.q_heads) * s.head_dim && k.cols == std::int64_t(s.kv_heads) * s.head_dim &&
            v.same_shape(k) && k.rows == tokens && out.same_shape(q) && log_sum.rows == tokens &&
            log_sum.cols == s.q_heads && log_sum.dtype == wide_type(q.dtype) && k.dtype == q.dtype &&
            v.dtype == q.dtype && out.dtype == q.dtype && segments.offsets.dtype == DType::i32 &&
            segments.offsets.rows == 1 && segments.offsets.cols >= 1,
        op, ": q ", q, " k ", k, " v ", v, " out ", out, " log_sum ", log_sum, " heads ", s.q_heads, '/', s.kv_heads,
        'x', s.head_dim);
}

// Multiply-adds of causal attention, counted as if every sequence had the longest length's mean share: T · longest / 2
// pairs.
double attention_flops(const ConstView& q, const Segments& segments, const AttentionShape& s) {
  return 2.0 * double(q.rows) * double(segments.longest) * double(s.q_heads) * double(s.head_dim);
}

}  // namespace

void Device::attention(View out, View log_sum, const ConstView& q, const ConstView& k, const ConstView& v,
                       const Segments& segments, const AttentionShape& shape) {
  check_attention("attention", out, log_sum, q, k, v, segments, shape);
  const Zone zone(*this, "attention", attention_flops(q, segments, shape));
  do_attention(out, log_sum, q, k, v, segments, shape);
}

void Device::attention_backward(View dq, View dk, View dv, const ConstView& dout, const ConstView& q,
                                const ConstView& k, const ConstView& v, const ConstView& out, const ConstView& log_sum,
                                const Segments& segments, const AttentionShape& shape) {
  check_attention("attention_backward", out, log_sum, q, k, v, segments, shape);
  check(dq.same_shape(q) && dk.same_shape(k) && dv.same_shape(v) && dout.same_shape(out) && dq.dtype == q.dtype &&
            dk.dtype == q.dtype && dv.dtype == q.dtype && dout.dtype == q.dtype,
        "attention_backward: dq ", dq, " dk ", dk, " dv ", dv, " dout ", dout);
  const Zone zone(*this, "attention_backward", 2.5 * attention_flops(q, segments, shape));
  do_attention_backward(dq, dk, dv, dout, q, k, v, out, log_sum, segments, shape);
}

void Device::swiglu(View y, const ConstView& gate_up) {
  check(gate_up.rows == y.rows && gate_up.cols == 2 * y.cols && gate_up.dtype == y.dtype, "swiglu: ", y, " of ",
        gate_up);
  const Zone zone(*this, "swiglu");
  do_swiglu(y, gate_up);
}

void Device::swiglu_backward(View dgate_up, const ConstView& dy, const ConstView& gate_up) {
  check(gate_up.rows == dy.rows && gate_up.cols == 2 * dy.cols && dgate_up.same_shape(gate_up) &&
            dgate_up.dtype == dy.dtype && gate_up.dtype == dy.dtype,
        "swiglu_backward: ", dgate_up, " from ", dy, " and ", gate_up);
  const Zone zone(*this, "swiglu_backward");
  do_swiglu_backward(dgate_up, dy, gate_up);
}

void Device::distill_loss(View dlogits, View terms, const ConstView& student, const ConstView& teacher,
                          const ConstView& labels, const LossSpec& spec, float scale, const VocabularyShard& shard) {
  const bool is_cut = shard.group && shard.group->size() > 1;
  const std::int64_t beyond = std::max<std::int64_t>(spec.vocabulary - shard.first, 0);
  const std::int64_t here = is_cut ? std::min(beyond, student.cols) : spec.vocabulary;
  check(dlogits.same_shape(student) && student.dtype == wide_type(student.dtype) && terms.rows == student.rows &&
            terms.cols == LossTerms::count && terms.dtype == student.dtype &&
            is_vector(labels, student.rows, DType::i32) && spec.vocabulary > 0 && here <= student.cols &&
            (is_cut ? shard.first >= 0 : shard.first == 0),
        "distill_loss: dlogits ", dlogits, " terms ", terms, " student ", student, " labels ", labels, " vocabulary ",
        spec.vocabulary, " from ", shard.first);
  check((spec.distill_weight == 0 && teacher.rows == 0) || (teacher.rows == student.rows && here <= teacher.cols),
        "distill_loss: teacher ", teacher, " student ", student, " vocabulary ", spec.vocabulary, " from ",
        shard.first);
  const Zone zone(*this, "distill_loss");
  if (student.rows > 0) do_distill_loss(dlogits, terms, student, teacher, labels, spec, scale, shard);
}

void Device::adamw(View param, View master, View m, View v, const ConstView& grad, const AdamWStep& step) {
  const DType wide = wide_type(param.dtype);
  check(param.rows == 1 && (master.data ? is_vector(master, param.cols, wide) : param.dtype == wide) &&
            is_vector(m, param.cols, wide) && is_vector(v, param.cols, wide) && is_vector(grad, param.cols, wide),
        "adamw: param ", param, " master ", master, " m ", m, " v ", v, " grad ", grad);
  const Zone zone(*this, "adamw");
  do_adamw(param, master, m, v, grad, step);
}

View Arena::make(std::int64_t rows, std::int64_t cols, DType dtype) {
  const std::size_t size = (std::size_t(rows * cols) * size_of(dtype) + 63) / 64 * 64;
  check(size <= capacity_ - used_, "arena of ", capacity_, " bytes is full: ", used_, " used, ", size, " asked for");
  void* memory = memory_ ? static_cast<char*>(memory_.get()) + used_ : nullptr;
  used_ += size;
  return {memory, rows, cols, dtype};
}

}  // namespace distill
