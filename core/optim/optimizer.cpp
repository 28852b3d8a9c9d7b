#include "core/optim/optimizer.h"

#include <algorithm>
#include <cmath>

namespace distill {

Optimizer::Optimizer(Device& device, const ParamTable& table, View values, const OptimizerConfig& config)
    : device_(device), table_(table), values_(values), config_(config) {
  const DType wide = wide_type(values.dtype);
  if (values.dtype != wide) masters_ = device.tensor(1, values.cols, wide);
  exp_avg_ = device.tensor(1, values.cols, wide);
  exp_avg_sq_ = device.tensor(1, values.cols, wide);
  sum_ = device.tensor(1, 1, DType::f64);
  device.zero(exp_avg_.view());
  device.zero(exp_avg_sq_.view());
  reset_masters();
}

void Optimizer::reset_masters() {
  if (masters_) device_.cast(masters_.view(), values_);
}

double Optimizer::gradient_norm(const ConstView& gradients) {
  device_.zero(sum_.view());
  device_.sum_of_squares(sum_.view(), gradients);
  double sum = 0;
  device_.download(&sum, sum_.view());
  return std::sqrt(sum);
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
  for (const Param& p : table_.all()) {
    step.weight_decay = p.decay ? config_.weight_decay : 0;
    const auto part = [&](const View& flat) { return flat.data ? flat.col_slice(p.offset, p.size()) : flat; };
    device_.adamw(part(values_), part(masters_.view()), part(exp_avg_.view()), part(exp_avg_sq_.view()),
                  gradients.col_slice(p.offset, p.size()), step);
  }
}

}  // namespace distill
