// What a resumed run must know beyond weights and moments.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace distill {

struct TrainState {
  std::int64_t step = 0;  // steps behind us; also the position in the data
  double loss_scale = 0;  // 0: fresh
  int loss_scale_good_steps = 0;
  int nonfinite_in_a_row = 0;  // skipped outliers count as well
  std::int64_t optimizer_updates = 0;
  std::int64_t samples = 0, tokens = 0;  // consumed by all ranks
  // Mean cross-entropy over the validation data at this very step; none where it was not validated or is not finite.
  std::optional<double> validation_loss = {};
  std::int64_t outlier_steps = 0;
  std::int64_t last_record = 0;  // the last step that metrics were written of; 0: none, or not known
  std::vector<double> recent_losses = {}, recent_gradient_norms = {};  // what outliers are told by, oldest first
};

}  // namespace distill
