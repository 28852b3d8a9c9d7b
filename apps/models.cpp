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

// A value depends on its place in the whole parameter only, so every grid draws the same weights.
void fill_random(Device& device, const ParamTable& table, const ModelSpec& spec, std::uint64_t seed, View values) {
  for (const Param& p : table.all()) {
    const View v = p.in(values);
    const auto fill = [&](View rows, std::int64_t row) {
      device.fill_normal(rows, seed, std::uint64_t(p.index), (p.first_row + row) * p.whole_cols + p.first_col,
                         float(spec.initializer_range));
    };
    switch (p.init) {
      case Init::normal:
        if (p.cols == p.whole_cols)
          fill(v, 0);
        else
          for (std::int64_t r = 0; r < p.rows; ++r) fill(v.row_slice(r, 1), r);
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
  }
}

}  // namespace

void fill_weights(Device& device, const std::filesystem::path& folder, const ParamTable& table, const ModelSpec& spec,
                  std::uint64_t seed, View values, Optimizer* optimizer) {
  Tensor staging;
  const auto store = [&](const Param& param, std::int64_t first, std::span<const float> part) {
    const std::int64_t n = std::int64_t(part.size());
    if (!staging || staging.view().cols < n) staging = device.tensor(1, n, DType::f32);
    const View block = staging.view().col_slice(0, n);
    device.upload(block, part.data());
    device.cast(values.col_slice(param.offset + first, n), block);
    if (optimizer) optimizer->set_masters(param.offset + first, block);
  };
  if (load_weights(folder, param_table(spec), table, store)) return;
  fill_random(device, table, spec, seed, values);
  if (optimizer) optimizer->reset_masters();
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
