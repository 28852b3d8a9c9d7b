// How the vocabulary is cut over the ranks of a tensor-parallel group.
#pragma once

#include <cstdint>

namespace distill {

// What a rank has of a model's embedding and output head.
struct VocabularyPart {
  std::int64_t first = 0;    // id of its first row
  std::int64_t rows = 0;     // rows of the tables; the last rank also has the padding behind the real vocabulary
  std::int64_t columns = 0;  // logits to compute: its real ids, rounded up for the matrix product as far as it has rows
};

// The cut depends on the real vocabulary alone, so that student and teacher have the same ids on a rank although their
// paddings differ. The last parts may be shorter, or without a real id.
VocabularyPart vocabulary_part(std::int64_t real_vocabulary, std::int64_t model_rows, int tp_size, int tp_rank);

}  // namespace distill
