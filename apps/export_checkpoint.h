// `distill export`: the student of a checkpoint as a Hugging Face folder, without its run.
#pragma once

#include <string>

#include "apps/run_plan.h"

namespace distill {

// Writes to `out`, which must not exist or be empty, what the run itself would have exported at that step. Streams:
// memory for a block of one tensor. `model`: the student's folder; empty: where the run found it.
void export_checkpoint(const std::string& checkpoint, const std::string& out, std::string model, const Say& say);

}  // namespace distill
