// Which GPU each rank gets.
#include "apps/devices.h"

#include <catch2/catch.hpp>
#include <utility>

#include "test/support/refusal.h"

using namespace distill;
using namespace distill::test;
using Numbers = std::vector<int>;

namespace {

Config wants(DeviceChoice device) {
  Config config;
  config.device = device;
  return config;
}

// `ranks` ranks on each of `nodes` nodes, which all see `gpus` GPUs of their node.
std::vector<RankSight> sights(int nodes, int ranks, int gpus) {
  std::vector<RankSight> all;
  for (int node = 0; node < nodes; ++node)
    for (int rank = 0; rank < ranks; ++rank) {
      RankSight sight{node, {}};
      for (int g = 0; g < gpus; ++g) sight.gpus.visible.push_back({"H100", text("0000:", g), std::size_t{80} << 30});
      if (gpus == 0) sight.gpus.problem = "no GPU is visible";
      all.push_back(sight);
    }
  return all;
}

Grid grid_of(int nodes, int ranks, int tp = 1) {
  std::vector<int> by_rank;
  for (int node = 0; node < nodes; ++node) by_rank.insert(by_rank.end(), std::size_t(ranks), node);
  return make_grid(by_rank, tp, 1, /*has_teacher=*/true);
}

}  // namespace

TEST_CASE("ranks of a node take a GPU each, or a student and its teacher share one") {
  const Config cuda = wants(DeviceChoice::cuda);
  CHECK(choose_gpus(cuda, grid_of(1, 1), sights(1, 1, 8)) == Numbers{0});
  CHECK(choose_gpus(cuda, grid_of(1, 4), sights(1, 4, 8)) == Numbers{0, 1, 2, 3});
  CHECK(choose_gpus(cuda, grid_of(1, 4), sights(1, 4, 2)) == Numbers{0, 1, 0, 1});
  CHECK(choose_gpus(cuda, grid_of(2, 2), sights(2, 2, 1)) == Numbers{0, 0, 0, 0});
  CHECK(choose_gpus(cuda, grid_of(2, 2), sights(2, 2, 2)) == Numbers{0, 1, 0, 1});
}

TEST_CASE("a launcher that shows each rank a GPU of its own is followed") {
  auto seen = sights(1, 4, 1);
  for (std::size_t rank = 0; rank < seen.size(); ++rank) seen[rank].gpus.visible[0].bus_id = text("0000:", rank);
  CHECK(choose_gpus(wants(DeviceChoice::cuda), grid_of(1, 4), seen) == Numbers{0, 0, 0, 0});
}

TEST_CASE("device_mapping counts the GPUs of all nodes") {
  Config config = wants(DeviceChoice::cuda);
  config.student.device_mapping = {3, 1};
  config.teacher.device_mapping = {2, 0};
  CHECK(choose_gpus(config, grid_of(1, 4), sights(1, 4, 4)) == Numbers{3, 1, 2, 0});
  config.student.device_mapping = config.teacher.device_mapping = {1, 2};
  CHECK(choose_gpus(config, grid_of(2, 2), sights(2, 2, 2)) == Numbers{1, 1, 0, 0});
  const auto problem = [&] { choose_gpus(config, grid_of(1, 4), sights(1, 4, 2)); };
  CHECK(refusal("", problem) ==
        "device: cuda: student.device_mapping gives rank 1 GPU 2: expected 0 to 1, the GPUs of node 0, where that rank "
        "is");
  config.student.device_mapping = {0};
  CHECK(refusal("", problem) ==
        "device: cuda: student.device_mapping names 1 devices: expected one for each rank of the role, 2");
}

TEST_CASE("two ranks on a GPU that takes one process are refused with cuda and mean CPUs with auto") {
  const auto exclusive = [](int nodes, int ranks, int gpus) {
    auto seen = sights(nodes, ranks, gpus);
    for (RankSight& sight : seen)
      for (Gpu& gpu : sight.gpus.visible) gpu.exclusive = true;
    return seen;
  };
  Config config = wants(DeviceChoice::cuda);
  CHECK(choose_gpus(config, grid_of(1, 1), exclusive(1, 1, 1)) == Numbers{0});
  CHECK(choose_gpus(config, grid_of(2, 2), exclusive(2, 2, 2)) == Numbers{0, 1, 0, 1});
  CHECK(refusal("", [&] { choose_gpus(config, grid_of(1, 4), exclusive(1, 4, 3)); }) ==
        "device: cuda: ranks 0 and 2 would share GPU 0 of node 0, whose compute mode is Exclusive_Process: expected a "
        "GPU for each rank; nvidia-smi -c DEFAULT, or MPS, lets them share one");
  CHECK(choose_gpus(wants(DeviceChoice::automatic), grid_of(1, 2), exclusive(1, 2, 1)).empty());
  config.student.device_mapping = config.teacher.device_mapping = {1};
  CHECK(choose_gpus(config, grid_of(1, 2), sights(1, 2, 2)) == Numbers{1, 1});
  CHECK_THAT(refusal("", [&] { choose_gpus(config, grid_of(1, 2), exclusive(1, 2, 2)); }),
             Catch::Contains("ranks 0 and 1 would share GPU 1 of node 0"));
}

TEST_CASE("too few GPUs, or none, are refused with cuda and mean CPUs with auto") {
  const auto chosen = [](DeviceChoice device, int ranks, int gpus) {
    return choose_gpus(wants(device), grid_of(1, ranks), sights(1, ranks, gpus));
  };
  CHECK(chosen(DeviceChoice::automatic, 2, 0).empty());
  CHECK(chosen(DeviceChoice::automatic, 4, 1).empty());
  CHECK(chosen(DeviceChoice::automatic, 4, 2).size() == 4);
  CHECK(chosen(DeviceChoice::cpu, 2, 8).empty());
  CHECK(refusal("", [&] { chosen(DeviceChoice::cuda, 2, 0); }) == "device: cuda: rank 0: no GPU is visible");
  CHECK(refusal("", [&] { chosen(DeviceChoice::cuda, 8, 3); }) ==
        "device: cuda: node 0 shows 3 GPUs to 8 ranks: expected 8, or 4 where a student and its teacher share one");
}

TEST_CASE("a rank asks for the library's attention when the model of its role does") {
  Config config;
  const auto wants = [&](Role role) {
    Place place;
    place.role = role;
    return wants_library_attention(config, place);
  };
  config.student.model_args.attn_implementation = AttentionHint::fa2;
  for (const Role role : {Role::student, Role::teacher, Role::both}) CHECK(!wants(role));
  config.teacher.model_args.attn_implementation = AttentionHint::sdpa;
  CHECK(!wants(Role::student));
  CHECK(wants(Role::teacher));
  CHECK(wants(Role::both));
  std::swap(config.student.model_args, config.teacher.model_args);
  CHECK(wants(Role::student));
  CHECK(!wants(Role::teacher));
  CHECK(wants(Role::both));
}
