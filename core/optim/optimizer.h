// AdamW over the flat storage of a model, with f32 master copies of 16-bit parameters, and global-norm clipping.
#pragma once

#include "core/device.h"
#include "core/model/params.h"

namespace distill {

struct OptimizerConfig {
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
  double weight_decay = 0;   // decoupled; matrices only
  double max_grad_norm = 0;  // 0: no clipping
};

class Optimizer {
 public:
  // `values`: flat parameters, any type; `table` says where each lies. Moments start at zero.
  Optimizer(Device& device, const ParamTable& table, View values, const OptimizerConfig& config);

  // Masters from the parameters; after parameters were loaded or drawn.
  void reset_masters();

  // 2-norm of the gradients [1, n]; NaN or infinity when one of them is.
  double gradient_norm(const ConstView& gradients);

  // One update at rate `lr`. The gradients are `gradient_scale` times too large and `norm` is the 2-norm of the
  // unscaled ones (clipping as torch.nn.utils.clip_grad_norm_: factor max_norm / (norm + 1e-6) where that is below 1).
  void step(const ConstView& gradients, double lr, double norm, double gradient_scale = 1);

  std::int64_t updates() const { return updates_; }
  void set_updates(std::int64_t n) { updates_ = n; }

  // Flat storages [1, n]; masters() is empty where the parameters are wide themselves.
  View masters() { return masters_.view(); }
  View exp_avg() { return exp_avg_.view(); }
  View exp_avg_sq() { return exp_avg_sq_.view(); }

 private:
  Device& device_;
  const ParamTable& table_;
  View values_;
  OptimizerConfig config_;
  Tensor masters_, exp_avg_, exp_avg_sq_;
  Tensor sum_;  // f64 [1, 1]
  std::int64_t updates_ = 0;
};

}  // namespace distill
