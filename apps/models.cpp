#include "apps/models.h"

#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

#include "io/model_folder.h"

namespace distill {

namespace {

void fill_random(Device& device, const ParamTable& table, const ModelSpec& spec, std::uint64_t seed, View values) {
  std::uint64_t index = 0;
  for (const Param& p : table.all()) {
    const View v = p.in(values);
    switch (p.init) {
      case Init::normal:
        device.fill_normal(v, seed, index, 0, float(spec.initializer_range));
        break;
      case Init::zeros:
        device.zero(v);
        break;
      case Init::ones: {
        const std::vector<float> ones(std::size_t(p.size()), 1.0f);
        Tensor staging = device.tensor(p.rows, p.cols, DType::f32);
        device.upload(staging.view(), ones.data());
        device.cast(v, staging.view());
      }
    }
    ++index;
  }
}

}  // namespace

Weights fill_weights(Device& device, const std::filesystem::path& folder, const ParamTable& table,
                     const ModelSpec& spec, std::uint64_t seed, View values, View masters) {
  Tensor staging;
  const auto store = [&](const Param& param, std::int64_t first, std::span<const float> part) {
    const std::int64_t n = std::int64_t(part.size());
    if (!staging || staging.view().cols < n) staging = device.tensor(1, n, DType::f32);
    const View block = staging.view().col_slice(0, n);
    device.upload(block, part.data());
    device.cast(values.col_slice(param.offset + first, n), block);
    if (masters.data) device.cast(masters.col_slice(param.offset + first, n), block);
  };
  if (load_weights(folder, table, store)) return Weights::loaded;
  fill_random(device, table, spec, seed, values);
  if (masters.data) device.cast(masters, values);
  return Weights::random;
}

int compute_threads(Communicator& world) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  check(sched_getaffinity(0, sizeof cores, &cores) == 0, "sched_getaffinity failed");
  // Ranks that a launcher bound have cores of their own, others share: they are the ranks of this node with the same
  // set.
  const std::string mine(reinterpret_cast<const char*>(&cores), sizeof cores);
  const std::vector<std::string> all = world.all_gather(mine);
  const auto node = [&](int rank) { return world.members()[std::size_t(rank)].node; };
  int sharing = 0;
  for (int rank = 0; rank < world.size(); ++rank)
    sharing += node(rank) == node(world.rank()) && all[std::size_t(rank)] == mine;
  if (const char* given = std::getenv("OMP_NUM_THREADS"); given && std::atoi(given) > 0) return std::atoi(given);
  return std::max(1, CPU_COUNT(&cores) / sharing);
}

}  // namespace distill
