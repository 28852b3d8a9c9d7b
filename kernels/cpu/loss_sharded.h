// The vector passes of the loss with the vocabulary cut over ranks. Between two passes stands one message for all
// positions of the call; what the ranks do next depends only on what all of them got, so they always do the same.
#pragma once

#include "core/communicator.h"
#include "kernels/cpu/loss_row.h"

namespace distill {

void sharded_rows(const LossCall& call, Communicator& group, LossScratch& scratch);

}  // namespace distill
