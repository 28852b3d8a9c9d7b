// A model on a device with the weights of its Hugging Face folder, or with random ones where the folder holds none.
#pragma once

#include <cstdint>
#include <filesystem>

#include "core/communicator.h"
#include "core/model/transformer.h"
#include "core/optim/optimizer.h"

namespace distill {

// Fills `values`, the storage of `table`, from the folder, and the optimiser's masters (null: there are none) with the
// file's full precision. Random weights are drawn from `seed` with the family's initializer_range; norms start at 1,
// biases at 0.
void fill_weights(Device& device, const std::filesystem::path& folder, const ParamTable& table, const ModelSpec& spec,
                  std::uint64_t seed, View values, Optimizer* optimizer);

// Compute threads of this rank: OMP_NUM_THREADS where it is set, else the cores it may use, shared out among the ranks
// of its node that may use the same ones. All ranks call it.
int compute_threads(Communicator& world);

}  // namespace distill
