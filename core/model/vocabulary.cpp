#include "core/model/vocabulary.h"

#include <algorithm>

namespace distill {

namespace {

constexpr std::int64_t tile = 64;  // of the matrix product

std::int64_t rounded_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

VocabularyPart vocabulary_part(std::int64_t real_vocabulary, std::int64_t model_rows, int tp_size, int tp_rank) {
  // Whole tiles where they cost little balance and leave no rank without columns.
  const bool is_large = real_vocabulary >= tile * tp_size * std::max(tp_size, 4);
  const std::int64_t width = rounded_up((real_vocabulary + tp_size - 1) / tp_size, is_large ? tile : 1);
  const std::int64_t first = std::min(tp_rank * width, model_rows);
  const std::int64_t end = tp_rank == tp_size - 1 ? model_rows : std::min(first + width, model_rows);
  const std::int64_t real_here = std::clamp<std::int64_t>(real_vocabulary - first, 0, width);
  return {first, end - first, std::min(rounded_up(real_here, tile), end - first)};
}

}  // namespace distill
