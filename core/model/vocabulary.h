// How the vocabulary is cut over tensor-parallel ranks.
#pragma once

#include <algorithm>
#include <cstdint>

namespace distill {

// Ids [first, first + rows) of embedding and head lie on a rank; the head computes the first `columns` of them.
struct VocabularyPart {
  std::int64_t first = 0, rows = 0, columns = 0;
};

// The cut follows from the real vocabulary alone, so a student's and a teacher's parts are the same columns although
// their paddings differ. Wide vocabularies are cut at multiples of 64 for the matrix product, as long as that leaves no
// rank without columns. The last rank also holds the padding rows of the model, which no product reads.
inline VocabularyPart vocabulary_part(std::int64_t real_vocabulary, std::int64_t model_rows, int tp_size, int tp_rank) {
  const std::int64_t step = tp_size == 1 || real_vocabulary >= std::int64_t{64} * tp_size * tp_size ? 64 : 1;
  const std::int64_t width = (real_vocabulary + step * tp_size - 1) / (step * tp_size) * step;
  const auto edge = [&](int rank) { return std::min(width * rank, model_rows); };
  VocabularyPart part;
  part.first = edge(tp_rank);
  part.columns = edge(tp_rank + 1) - part.first;
  part.rows = (tp_rank + 1 == tp_size ? model_rows : edge(tp_rank + 1)) - part.first;
  return part;
}

}  // namespace distill
