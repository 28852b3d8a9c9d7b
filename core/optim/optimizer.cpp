#include "core/optim/optimizer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/out_of_memory.h"

namespace distill {

namespace {

std::vector<Optimizer::Piece> pieces_of(const ParamTable& table, const OptimizerShare& share) {
  std::vector<Optimizer::Piece> pieces;
  std::int64_t state = 0;
  for (const Range& owned : share.owned) {
    for (const Param& p : table.all()) {
      const std::int64_t begin = std::max(owned.begin, p.offset), end = std::min(owned.end(), p.offset + p.size());
      if (begin >= end) continue;
      const bool counts = share.counts && !p.is_copy && share.tp_rank % p.sharers == 0;
      pieces.push_back({&p, {begin, end - begin}, state + begin - owned.begin, counts});
    }
    state += owned.size;
  }
  return pieces;
}

}  // namespace

OptimizerShare whole_share(const ParamTable& table) { return {.owned = {{0, table.storage_size()}}}; }

Optimizer::Optimizer(Device& device, const ParamTable& table, View values, const OptimizerConfig& config,
                     OptimizerShare share)
    : device_(device), values_(values), config_(config), pieces_(pieces_of(table, share)) {
  const DType wide = wide_type(values.dtype);
  std::int64_t owned = 0;
  for (const Range& range : share.owned) owned += range.size;
  const auto state = [&] {
    Tensor t = with_memory_for("AdamW's state", [&] { return device.tensor(1, owned, wide); });
    device.zero(t.view());
    return t;
  };
  if (values.dtype != wide) masters_ = state();
  exp_avg_ = state();
  exp_avg_sq_ = state();
  sum_ = device.tensor(1, 1, DType::f64);
  reset_masters();
}

void Optimizer::reset_masters() { set_masters(0, values_); }

void Optimizer::set_masters(std::int64_t first, const ConstView& x) {
  if (!masters_) return;
  for (const Piece& p : pieces_) {
    const std::int64_t begin = std::max(p.range.begin, first), end = std::min(p.range.end(), first + x.cols);
    if (begin < end)
      device_.cast(masters_.view().col_slice(p.state + begin - p.range.begin, end - begin),
                   x.col_slice(begin - first, end - begin));
  }
}

double Optimizer::squared_norm(const ConstView& gradients, double gradient_scale) {
  device_.zero(sum_.view());
  for (const Piece& p : pieces_)
    if (p.counts) device_.sum_of_squares(sum_.view(), gradients.col_slice(p.range.begin, p.range.size));
  double sum = 0;
  device_.download(&sum, sum_.view());
  return sum / (gradient_scale * gradient_scale);
}

void Optimizer::step(const ConstView& gradients, double lr, double norm, double gradient_scale) {
  ++updates_;
  AdamWStep step;
  step.lr = lr;
  step.beta1 = config_.beta1;
  step.beta2 = config_.beta2;
  step.epsilon = config_.epsilon;
  step.bias_correction1 = 1 - std::pow(config_.beta1, double(updates_));
  step.bias_correction2 = 1 - std::pow(config_.beta2, double(updates_));
  const double clip = config_.max_grad_norm > 0 ? std::min(1.0, config_.max_grad_norm / (norm + 1e-6)) : 1.0;
  step.grad_scale = clip / gradient_scale;
  for (const Piece& p : pieces_) {
    step.weight_decay = p.param->decay ? config_.weight_decay : 0;
    const auto in_state = [&](const View& flat) { return flat.data ? flat.col_slice(p.state, p.range.size) : flat; };
    device_.adamw(values_.col_slice(p.range.begin, p.range.size), in_state(masters_.view()), in_state(exp_avg_.view()),
                  in_state(exp_avg_sq_.view()), gradients.col_slice(p.range.begin, p.range.size), step);
  }
}

}  // namespace distill
