#include "parallel/grid.h"

#include <algorithm>
#include <iomanip>
#include <map>
#include <sstream>

namespace distill {

namespace {

// Ranks of each node in rising order, nodes in the order of their lowest ranks.
std::vector<std::vector<int>> ranks_by_node(std::span<const int> nodes) {
  std::map<int, std::size_t> index;
  std::vector<std::vector<int>> ranks;
  for (std::size_t r = 0; r < nodes.size(); ++r) {
    const auto [found, is_new] = index.emplace(nodes[r], ranks.size());
    if (is_new) ranks.emplace_back();
    ranks[found->second].push_back(int(r));
  }
  return ranks;
}

std::string ranks(std::int64_t n) { return text(n, n == 1 ? " rank" : " ranks"); }

// "4 or 8": the multiples of unit next to n, for "start … ranks".
std::string next_counts(int n, int unit) {
  const int below = n / unit * unit;
  return below > 0 ? text(below, " or ", below + unit) : text(below + unit);
}

// roles: 2 with a teacher. What is suggested fits the whole grid where there is one node, and its part of it otherwise.
void check_counts(const std::vector<std::vector<int>>& by_node, std::span<const std::string> hosts, int tp, int pp,
                  int roles) {
  const bool is_one_node = by_node.size() == 1;
  const int unit = roles * tp * (is_one_node ? pp : 1);
  int total = 0;
  for (std::size_t node = 0; node < by_node.size(); ++node) {
    const int count = int(by_node[node].size());
    const std::string where = is_one_node     ? ""
                              : hosts.empty() ? text(" on node ", node)
                                              : text(" on ", hosts[std::size_t(by_node[node].front())]);
    check_input(count % roles == 0, ranks(count), where, " cannot be split into as many students as teachers: start ",
                next_counts(count, unit), " ranks", where,
                ", or set distill_loss_weight: 0 to train without a teacher on any number");
    check_input(count % (roles * tp) == 0, ranks(count), where, " cannot be cut into groups of tp_size ", tp,
                roles == 2 ? " for students and for teachers" : "", " (a group stays inside a node): start ",
                next_counts(count, unit), " ranks", where);
    total += count;
  }
  check_input(total % (roles * tp * pp) == 0, ranks(total), roles == 2 ? " (half of them students)" : "",
              " cannot be cut into grids of tp_size ", tp, " x pp_size ", pp, ": start ",
              next_counts(total, roles * tp * pp), " ranks");
}

}  // namespace

std::string_view name_of(Role role) {
  switch (role) {
    case Role::student:
      return "student";
    case Role::teacher:
      return "teacher";
    case Role::both:
      return "both";
  }
  return "?";
}

Grid make_grid(std::span<const int> nodes, int tp, int pp, bool has_teacher, std::span<const std::string> hosts) {
  check(!nodes.empty() && tp > 0 && pp > 0, "grid of ", nodes.size(), " ranks, tp_size ", tp, ", pp_size ", pp);
  const auto by_node = ranks_by_node(nodes);
  const bool is_alone = nodes.size() == 1 && tp * pp == 1;
  const int roles = has_teacher && !is_alone ? 2 : 1;
  check_counts(by_node, hosts, tp, pp, roles);

  Grid grid;
  grid.sizes = {tp, pp, int(nodes.size()) / (roles * tp * pp)};
  grid.places.resize(nodes.size());
  int index = 0;  // among the ranks of a role
  for (std::size_t node = 0; node < by_node.size(); ++node) {
    const std::vector<int>& here = by_node[node];
    const std::size_t students = here.size() / std::size_t(roles);
    for (std::size_t i = 0; i < students; ++i, ++index) {
      Place place;
      place.node = int(node);
      place.tp_rank = index % tp;
      place.dp_rank = index / tp % grid.sizes.dp;
      place.pp_rank = index / (tp * grid.sizes.dp);
      if (roles == 1) {
        place.role = has_teacher ? Role::both : Role::student;
        place.partner = has_teacher ? here[i] : -1;
        grid.places[std::size_t(here[i])] = place;
        continue;
      }
      const int student = here[i], teacher = here[students + i];
      place.role = Role::student;
      place.partner = teacher;
      grid.places[std::size_t(student)] = place;
      place.role = Role::teacher;
      place.partner = student;
      grid.places[std::size_t(teacher)] = place;
    }
  }
  return grid;
}

std::vector<int> nodes_of(const Communicator& world) {
  std::vector<int> nodes;
  for (const Member& member : world.members()) nodes.push_back(member.node);
  return nodes;
}

std::vector<std::string> hosts_of(const Communicator& world) {
  std::vector<std::string> hosts;
  for (const Member& member : world.members()) hosts.push_back(member.host);
  return hosts;
}

std::string describe(const Grid& grid, std::span<const std::string> hosts) {
  std::ostringstream out;
  out << "grid: tp " << grid.sizes.tp << ", dp " << grid.sizes.dp << ", pp " << grid.sizes.pp << ", "
      << ranks(std::int64_t(grid.places.size())) << "\n";
  out << "  rank  role     tp  dp  pp  partner  node\n";
  for (std::size_t r = 0; r < grid.places.size(); ++r) {
    const Place& place = grid.places[r];
    out << std::setw(6) << r << "  " << std::left << std::setw(7) << name_of(place.role) << std::right << std::setw(4)
        << place.tp_rank << std::setw(4) << place.dp_rank << std::setw(4) << place.pp_rank << std::setw(9)
        << (place.partner < 0 ? "-" : std::to_string(place.partner)) << "  "
        << (r < hosts.size() ? hosts[r] : std::to_string(place.node)) << "\n";
  }
  return out.str();
}

int role_rank(const GridSizes& sizes, const Place& place) {
  return place.tp_rank + sizes.tp * (place.dp_rank + sizes.dp * place.pp_rank);
}

Groups make_groups(Communicator& world, const Grid& grid, int kv_sharers) {
  check(int(grid.places.size()) == world.size(), "a grid of ", grid.places.size(), " ranks for ", world.size());
  const Place& me = grid.places[std::size_t(world.rank())];
  const GridSizes& sizes = grid.sizes;
  Groups groups;
  groups.role =
      world.split(is_student(me.role) ? 0 : 1, role_rank(sizes, me), is_student(me.role) ? "students" : "teachers");
  const auto group = [&](const char* name, int color, int key) {
    return groups.role->split(color, key, text(name, " ", color, " of ", groups.role->name()));
  };
  const int pipeline = me.tp_rank + sizes.tp * me.dp_rank;
  groups.tp = group("tp", me.dp_rank + sizes.dp * me.pp_rank, me.tp_rank);
  groups.dp = group("dp", me.tp_rank + sizes.tp * me.pp_rank, me.dp_rank);
  groups.pp_forward = group("pp", pipeline, me.pp_rank);
  groups.pp_backward = group("pp (backward)", pipeline, me.pp_rank);
  groups.kv = groups.tp->split(me.tp_rank / kv_sharers, me.tp_rank, text("kv of ", groups.tp->name()));
  const bool is_end = sizes.pp > 1 && (me.pp_rank == 0 || me.pp_rank == sizes.pp - 1);
  groups.tied = group("tied embeddings", is_end ? pipeline : -1, me.pp_rank);
  const bool has_partner = me.partner >= 0 && me.partner != world.rank();
  groups.partners =
      world.split(has_partner ? std::min(me.partner, world.rank()) : -1, is_student(me.role) ? 0 : 1, "partners");
  return groups;
}

}  // namespace distill
