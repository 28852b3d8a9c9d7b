// `distill encode`: encodes the records of a configuration and keeps them for later runs.
#pragma once

#include "apps/data_set.h"

namespace distill {

// All ranks of world call it; its first rank works. A line about each data set goes to `say`. What is wrong is a
// CommonError.
void encode_and_keep(Communicator& world, const ConfigFile& file, int threads, const Say& say, const Say& progress);

}  // namespace distill
