// A model on a device with the weights of its Hugging Face folder, or with random ones where the folder holds none.
#pragma once

#include <cstdint>
#include <filesystem>

#include "core/communicator.h"
#include "core/model/transformer.h"

namespace distill {

enum class Weights { loaded, random };

// Fills `values` (and `masters`, wide, where there are any: with the file's full precision) from the folder. Random
// weights are drawn from `seed` with the family's initializer_range; norms start at 1, biases at 0.
Weights fill_weights(Device& device, const std::filesystem::path& folder, const ParamTable& table,
                     const ModelSpec& spec, std::uint64_t seed, View values, View masters);

// Compute threads of this rank: OMP_NUM_THREADS where it is set, else the cores it may use, shared out among the ranks
// of its node that may use the same ones. All ranks call it.
int compute_threads(Communicator& world);

}  // namespace distill
