#include "test/support/loss_chunk.h"

namespace distill::test {

void loss_under_test(View dlogits, View terms, const ConstView& student, const ConstView& teacher,
                     const ConstView& labels, const LossSpec& spec, float scale, int threads, LossScratch& scratch,
                     const VocabularyShard& shard) {
  distill_loss_cpu(dlogits, terms, student, teacher, labels, spec, scale, threads, scratch, shard);
}

}  // namespace distill::test
