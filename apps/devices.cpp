#include "apps/devices.h"

#include <algorithm>
#include <iomanip>
#include <iostream>
#include <map>
#include <set>
#include <sstream>
#include <utility>

#include "core/group_on_device.h"
#include "kernels/backends.h"
#include "parallel/parallel.h"

namespace distill {

namespace {

const WorkerConfig& worker_of(const Config& config, Role role) {
  return role == Role::teacher ? config.teacher : config.student;
}

std::string key_of(Role role) { return text(role == Role::teacher ? "teacher" : "student", ".device_mapping"); }

bool same_gpus(const Gpus& a, const Gpus& b) {
  return std::equal(a.visible.begin(), a.visible.end(), b.visible.begin(), b.visible.end(),
                    [](const Gpu& x, const Gpu& y) { return x.bus_id == y.bus_id; });
}

// Why this rank gets no GPU, or its number in `gpu`.
std::string mapped(const Config& config, const Grid& grid, const std::vector<RankSight>& sights, std::size_t rank,
                   int& gpu) {
  const Place& place = grid.places[rank];
  const std::vector<int>& mapping = worker_of(config, place.role).device_mapping;
  const std::size_t index = std::size_t(role_rank(grid.sizes, place));
  const int count = int(sights[rank].gpus.visible.size());
  if (index >= mapping.size())
    return text(key_of(place.role), " names ", mapping.size(), " devices: expected one for each rank of the role, ",
                grid.sizes.tp * grid.sizes.pp * grid.sizes.dp);
  gpu = mapping[index] - place.node * count;
  if (gpu >= 0 && gpu < count) return {};
  return text(key_of(place.role), " gives rank ", rank, " GPU ", mapping[index], ": expected ", place.node * count,
              " to ", place.node * count + count - 1, ", the GPUs of node ", place.node, ", where that rank is");
}

// The same for a rank without device_mapping.
std::string shared_out(const Grid& grid, const std::vector<RankSight>& sights, std::size_t rank, int& gpu) {
  // The ranks that choose among the same GPUs, and where this one stands among them and among those of its role.
  int ranks = 0, index = 0, students = 0, index_in_role = 0;
  for (std::size_t other = 0; other < sights.size(); ++other) {
    if (sights[other].node != sights[rank].node || !same_gpus(sights[other].gpus, sights[rank].gpus)) continue;
    const bool is_before = other < rank, is_same_role = grid.places[other].role == grid.places[rank].role;
    ++ranks;
    index += is_before;
    students += is_student(grid.places[other].role);
    index_in_role += is_before && is_same_role;
  }
  const int count = int(sights[rank].gpus.visible.size());
  const int wanted = std::max(students, ranks - students);
  gpu = ranks <= count ? index : index_in_role;
  if (wanted <= count) return {};
  return text("node ", grid.places[rank].node, " shows ", count, count == 1 ? " GPU" : " GPUs", " to ", ranks,
              " ranks: expected ", ranks, ", or ", wanted, " where a student and its teacher share one");
}

// The same for all ranks.
std::string given_out(const Config& config, const Grid& grid, const std::vector<RankSight>& sights,
                      std::vector<int>& gpus) {
  for (std::size_t rank = 0; rank < sights.size(); ++rank) {
    if (!sights[rank].gpus.problem.empty()) return text("rank ", rank, ": ", sights[rank].gpus.problem);
    const bool has_mapping = !worker_of(config, grid.places[rank].role).device_mapping.empty();
    const std::string problem =
        has_mapping ? mapped(config, grid, sights, rank, gpus[rank]) : shared_out(grid, sights, rank, gpus[rank]);
    if (!problem.empty()) return problem;
  }
  std::map<std::pair<int, std::string>, std::size_t> first_on;  // by node and bus id: a rank
  for (std::size_t rank = 0; rank < sights.size(); ++rank) {
    const Gpu& gpu = sights[rank].gpus.visible[std::size_t(gpus[rank])];
    const auto [other, is_new] = first_on.try_emplace({sights[rank].node, gpu.bus_id}, rank);
    if (gpu.exclusive && !is_new)
      return text("ranks ", other->second, " and ", rank, " would share GPU ", gpus[rank], " of node ",
                  sights[rank].node, ", whose compute mode is Exclusive_Process: expected a GPU for each rank; ",
                  "nvidia-smi -c DEFAULT, or MPS, lets them share one");
  }
  return {};
}

}  // namespace

std::vector<int> choose_gpus(const Config& config, const Grid& grid, const std::vector<RankSight>& sights) {
  if (config.device == DeviceChoice::cpu) return {};
  std::vector<int> gpus(sights.size());
  const std::string problem = given_out(config, grid, sights, gpus);
  if (problem.empty()) return gpus;
  if (config.device == DeviceChoice::automatic) return {};
  fail_input("device: cuda: ", problem);
}

namespace {

// Lines: problem, then name, bus id, bytes and `exclusive` of every GPU.
std::string packed(const Gpus& gpus) {
  std::string out = gpus.problem + "\n";
  for (const Gpu& gpu : gpus.visible)
    out += text(gpu.name, "\n", gpu.bus_id, "\n", gpu.memory, " ", gpu.exclusive, "\n");
  return out;
}
Gpus unpacked(const std::string& lines) {
  std::istringstream in(lines);
  Gpus gpus;
  std::getline(in, gpus.problem);
  for (Gpu gpu; std::getline(in, gpu.name) && std::getline(in, gpu.bus_id);) {
    in >> gpu.memory >> gpu.exclusive >> std::ws;
    gpus.visible.push_back(gpu);
  }
  return gpus;
}

}  // namespace

RunDevices find_devices(const Config& config, const Grid& grid, Communicator& world) {
  RunDevices devices;
  if (config.device == DeviceChoice::cpu) return devices;
  for (const std::string& lines : world.all_gather(packed(find_gpus()))) {
    const int node = world.members()[devices.sights.size()].node;
    devices.sights.push_back({node, unpacked(lines)});
  }
  world.run_together([&] { devices.gpus = choose_gpus(config, grid, devices.sights); });
  return devices;
}

std::string describe(const RunDevices& devices, const Grid& grid, const Communicator& world) {
  if (!devices.are_gpus()) {
    const bool looked = !devices.sights.empty() && !devices.sights.front().gpus.problem.empty();
    return text("  device: cpu", looked ? text(" (", devices.sights.front().gpus.problem, ")") : "");
  }
  std::ostringstream out;
  out << "devices:\n  rank  role     host  GPU";
  for (std::size_t rank = 0; rank < devices.gpus.size(); ++rank) {
    const Gpu& gpu = devices.sights[rank].gpus.visible[std::size_t(devices.gpus[rank])];
    const std::string& host = world.members()[rank].host;
    out << "\n"
        << std::setw(6) << rank << "  " << std::left << std::setw(7) << name_of(grid.places[rank].role) << std::right
        << "  " << (host.empty() ? "this" : host) << "  " << devices.gpus[rank] << " (" << gpu.name << ", "
        << (gpu.memory >> 30) << " GiB, " << gpu.bus_id << ")";
  }
  return out.str();
}

bool wants_library_attention(const Config& config, const Place& place) {
  const auto wants = [](const WorkerConfig& worker) {
    return worker.model_args.attn_implementation == AttentionHint::sdpa;
  };
  return (is_student(place.role) && wants(config.student)) || (is_teacher(place.role) && wants(config.teacher));
}

std::unique_ptr<Device> make_device(const RunDevices& devices, const Config& config, const Grid& grid, int rank,
                                    int threads) {
  if (!devices.are_gpus()) return make_cpu_device(threads);
  const Place& place = grid.places[std::size_t(rank)];
  CudaOptions options;
  options.library_attention = wants_library_attention(config, place);
  if (role_rank(grid.sizes, place) == 0)
    options.warn = [](const std::string& message) { std::cerr << "warning: " << message << std::endl; };
  return make_cuda_device(devices.gpus[std::size_t(rank)], options);
}

namespace {

// NCCL takes no two ranks of a group on one GPU.
bool have_gpus_of_their_own(const Communicator& group, const RunDevices& devices) {
  std::set<std::pair<int, std::string>> taken;
  for (const Member& member : group.members()) {
    const std::size_t rank = std::size_t(member.world_rank);
    const RankSight& sight = devices.sights[rank];
    taken.emplace(sight.node, sight.gpus.visible[std::size_t(devices.gpus[rank])].bus_id);
  }
  return int(taken.size()) == group.size();
}

}  // namespace

void move_to_device(Groups& groups, Device& device, const RunDevices& devices) {
  if (!devices.are_gpus()) return;
  const auto move = [&](std::unique_ptr<Communicator>& group, GpuTraffic traffic) {
    if (!group) return;
    if (group->size() > 1 && have_gpus_of_their_own(*group, devices))
      group = make_gpu_group(device, std::move(group), traffic);
    else
      group = std::make_unique<StagedGroup>(device, std::move(group));
  };
  move(groups.tp, GpuTraffic::collectives);
  move(groups.dp, GpuTraffic::collectives);
  move(groups.pp_forward, GpuTraffic::upward);
  move(groups.pp_backward, GpuTraffic::downward);
  move(groups.kv, GpuTraffic::collectives);
  move(groups.tied, GpuTraffic::collectives);
}

}  // namespace distill
