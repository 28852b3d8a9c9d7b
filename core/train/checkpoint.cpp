#include "core/train/checkpoint.h"

namespace distill {

std::vector<CheckpointTensor> checkpoint_tensors(std::string_view kind, const ParamTable& table, const View& flat) {
  std::vector<CheckpointTensor> tensors;
  for (const Param& param : table.all())
    tensors.push_back({.name = text(kind, '/', param.name),
                       .data = param.in(flat),
                       .whole_rows = param.rows,
                       .whole_cols = param.cols});
  return tensors;
}

}  // namespace distill
