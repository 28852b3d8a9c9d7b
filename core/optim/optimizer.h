// AdamW over the flat storage of a model, with f32 master copies of 16-bit parameters, and global-norm clipping.
// Masters and moments may be kept for some ranges of the storage only (ZeRO stage 1, Rajbhandari et al. 2020): every
// data-parallel rank updates its own.
#pragma once

#include <vector>

#include "core/device.h"
#include "core/model/params.h"

namespace distill {

struct OptimizerConfig {
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
  double weight_decay = 0;   // decoupled; matrices only
  double max_grad_norm = 0;  // 0: no clipping
};

// What a rank updates, and what it counts in the gradient norm so that every element of the grid counts once.
struct OptimizerShare {
  std::vector<Range> owned;  // of the flat storage, ascending
  bool counts = true;        // false: another data-parallel rank owns the same and counts it
  int tp_rank = 0;           // of the ranks that share a parameter the first one counts it
};
// The whole storage, on one rank.
OptimizerShare whole_share(const ParamTable& table);

class Optimizer {
 public:
  // A parameter's elements within an owned range.
  struct Piece {
    const Param* param;
    Range range;         // in the flat storage
    std::int64_t state;  // first element in the storages of masters and moments
    bool counts;
  };

  // `values`: flat parameters, any type; `table` says where each lies and must outlive this. Moments start at zero.
  Optimizer(Device& device, const ParamTable& table, View values, const OptimizerConfig& config, OptimizerShare share);
  Optimizer(Device& device, const ParamTable& table, View values, const OptimizerConfig& config)
      : Optimizer(device, table, values, config, whole_share(table)) {}

  // Masters from the parameters; after parameters were drawn.
  void reset_masters();
  // Masters of elements [first, first + x.cols) of the flat storage, as far as they are owned, from x [1, n].
  void set_masters(std::int64_t first, const ConstView& x);

  // Σ g² of what this rank counts of the gradients [1, n], which are `gradient_scale` times too large; NaN or infinity
  // when one of them is. The sum over all ranks is the squared 2-norm.
  double squared_norm(const ConstView& gradients, double gradient_scale = 1);

  // One update at rate `lr`. `norm` is the 2-norm of the whole unscaled gradient (clipping as
  // torch.nn.utils.clip_grad_norm_: factor max_norm / (norm + 1e-6) where that is below 1).
  void step(const ConstView& gradients, double lr, double norm, double gradient_scale = 1);

  std::int64_t updates() const { return updates_; }
  void set_updates(std::int64_t n) { updates_ = n; }

  const std::vector<Piece>& pieces() const { return pieces_; }
  // Storages [1, n] of the owned ranges, one after the other; masters() is empty where the parameters are wide
  // themselves.
  View masters() { return masters_.view(); }
  View exp_avg() { return exp_avg_.view(); }
  View exp_avg_sq() { return exp_avg_sq_.view(); }

 private:
  Device& device_;
  View values_;
  OptimizerConfig config_;
  std::vector<Piece> pieces_;
  Tensor masters_, exp_avg_, exp_avg_sq_;
  Tensor sum_;  // f64 [1, 1]
  std::int64_t updates_ = 0;
};

}  // namespace distill
