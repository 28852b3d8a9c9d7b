// When a run validates, and on what. Both roles go by it: at the same steps the teacher runs forward for the same
// batches.
#pragma once

#include <cstdint>

#include "core/train/data_source.h"

namespace distill {

struct Validation {
  const DataSource* data = nullptr;  // null: none. An epoch of it is the whole set, each sample once
  std::int64_t eval_steps = 0;       // 0: only at the end
  std::int64_t total_steps = 0;

  // After so many steps.
  bool is_due(std::int64_t steps) const {
    return data && (steps == total_steps || (eval_steps > 0 && steps % eval_steps == 0));
  }
};

}  // namespace distill
