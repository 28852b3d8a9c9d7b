#include "core/train/checkpoint.h"

#include <algorithm>

namespace distill {

namespace {

// Rows [row, row + rows) and columns [col, col + cols) of a parameter's part, which lie in `data` one after the other.
CheckpointTensor tensor(std::string_view kind, const Param& p, View data, std::int64_t row, std::int64_t rows,
                        std::int64_t col, std::int64_t cols) {
  return {.name = text(kind, '/', p.name),
          .data = data.reshaped(rows, cols),
          .whole_rows = p.whole_rows,
          .whole_cols = p.whole_cols,
          .first_row = p.first_row + row,
          .first_col = p.first_col + col};
}

}  // namespace

std::vector<CheckpointTensor> checkpoint_tensors(std::string_view kind, const ParamTable& table, const View& flat,
                                                 CheckpointUse use, int tp_rank, bool is_writer) {
  std::vector<CheckpointTensor> tensors;
  for (const Param& p : table.all()) {
    if (p.size() == 0) continue;
    if (use == CheckpointUse::save && (!is_writer || p.is_copy || tp_rank % p.sharers != 0)) continue;
    tensors.push_back(tensor(kind, p, flat.col_slice(p.offset, p.size()), 0, p.rows, 0, p.cols));
  }
  return tensors;
}

std::vector<CheckpointTensor> checkpoint_tensors(std::string_view kind, const std::vector<Optimizer::Piece>& pieces,
                                                 const View& storage, CheckpointUse use) {
  std::vector<CheckpointTensor> tensors;
  if (!storage.data) return tensors;
  for (const Optimizer::Piece& piece : pieces) {
    if (use == CheckpointUse::save && !piece.counts) continue;
    const Param& p = *piece.param;
    std::int64_t at = piece.range.begin - p.offset, state = piece.state;  // next element in the part, in the storage
    const std::int64_t end = at + piece.range.size;
    while (at < end) {
      const std::int64_t row = at / p.cols, col = at % p.cols;
      const bool is_row_begin = col == 0;
      const std::int64_t rows = is_row_begin ? std::max<std::int64_t>((end - at) / p.cols, 1) : 1;
      const std::int64_t cols = std::min(p.cols - col, end - at);
      tensors.push_back(tensor(kind, p, storage.col_slice(state, rows * cols), row, rows, col, cols));
      at += rows * cols;
      state += rows * cols;
    }
  }
  return tensors;
}

}  // namespace distill
