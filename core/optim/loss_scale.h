// Dynamic loss scaling for f16 gradients (Micikevicius et al. 2018; constants as torch.amp.GradScaler).
#pragma once

#include <algorithm>

namespace distill {

class LossScale {
 public:
  // Inactive: the scale is 1 and stays.
  explicit LossScale(bool active) : active_(active), scale_(active ? 65536.0 : 1.0) {}

  double value() const { return scale_; }
  // A smaller scale could still make gradients finite.
  bool can_shrink() const { return active_ && scale_ > 1; }
  void shrink() {
    scale_ = std::max(1.0, scale_ / 2);
    good_steps_ = 0;
  }
  void count_good_step() {
    if (active_ && ++good_steps_ == growth_interval) {
      scale_ = std::min(scale_ * 2, 16777216.0);  // beyond 2^24 a sum of f32 gradients gains nothing
      good_steps_ = 0;
    }
  }

  int good_steps() const { return good_steps_; }
  void restore(double scale, int good_steps) {
    scale_ = scale;
    good_steps_ = good_steps;
  }

 private:
  static constexpr int growth_interval = 2000;
  bool active_;
  double scale_;
  int good_steps_ = 0;
};

}  // namespace distill
