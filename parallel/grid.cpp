#include "parallel/grid.h"

#include <algorithm>
#include <iomanip>
#include <map>
#include <sstream>
#include <utility>

#include "parallel/parallel.h"

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
    check_input(
        count % roles == 0, ranks(count), where,
        " cannot be split into as many students as teachers; distill_loss_weight: 0 trains without a teacher on "
        "any number");
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

int role_rank(const GridSizes& sizes, const Place& place) {
  return place.tp_rank + sizes.tp * (place.dp_rank + sizes.dp * place.pp_rank);
}

namespace {

// Where a rank belongs in one kind of group: ranks of one color form a group, ordered by key; a negative color is none.
struct Seat {
  int color, key;
};
struct Seats {
  Seat role, tp, dp, pp, kv, tied, partners;
};

// Colors differ between the roles, so that every group can be split from the world.
Seats seats_of(const Grid& grid, int rank, int kv_sharers) {
  const Place& me = grid.places[std::size_t(rank)];
  const GridSizes& sizes = grid.sizes;
  const int role = is_student(me.role) ? 0 : 1, block = me.dp_rank + sizes.dp * me.pp_rank,
            pipeline = me.tp_rank + sizes.tp * me.dp_rank;
  const auto color = [&](int within_role) { return 2 * within_role + role; };
  const bool is_end = sizes.pp > 1 && (me.pp_rank == 0 || me.pp_rank == sizes.pp - 1),
             ties = is_end && is_student(me.role),  // gradients of tied embeddings, which teachers do not have
      has_partner = me.partner >= 0 && me.partner != rank;
  return {.role = {role, role_rank(sizes, me)},
          .tp = {color(block), me.tp_rank},
          .dp = {color(me.tp_rank + sizes.tp * me.pp_rank), me.dp_rank},
          .pp = {color(pipeline), me.pp_rank},
          .kv = {color(block * (sizes.tp / kv_sharers) + me.tp_rank / kv_sharers), me.tp_rank},
          .tied = {ties ? color(pipeline) : -1, me.pp_rank},
          .partners = {has_partner ? std::min(me.partner, rank) : -1, role}};
}

// "  tp groups: 0 1 | 2 3" by world rank; nothing where they are groups of one.
std::string describe_groups(const Grid& grid, const char* name, Seat Seats::*kind) {
  constexpr std::size_t most_shown = 16;
  std::map<int, std::map<int, int>> by_color;  // color → key → rank
  for (int rank = 0; rank < int(grid.places.size()); ++rank)
    if (const Seat seat = seats_of(grid, rank, /*kv_sharers=*/1).*kind; seat.color >= 0)
      by_color[seat.color][seat.key] = rank;
  if (by_color.empty() || by_color.begin()->second.size() == 1) return {};
  std::string line = text("  ", name, ":");
  std::size_t shown = 0;
  for (const auto& [_, ranks] : by_color) {
    if (shown++ == most_shown) return text(line, " | … ", by_color.size(), " in all\n");
    if (shown > 1) line += " |";
    for (const auto& [__, rank] : ranks) line += text(' ', rank);
  }
  return line + "\n";
}

}  // namespace

std::string describe(const Grid& grid, bool is_tied, std::span<const std::string> hosts) {
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
  out << describe_groups(grid, "tp groups", &Seats::tp) << describe_groups(grid, "dp groups", &Seats::dp)
      << describe_groups(grid, "pp groups", &Seats::pp)
      << (is_tied ? describe_groups(grid, "embedding groups", &Seats::tied) : "");
  return out.str();
}

Groups make_groups(Communicator& world, const Grid& grid, int kv_sharers) {
  check(int(grid.places.size()) == world.size(), "a grid of ", grid.places.size(), " ranks for ", world.size());
  const Seats seats = seats_of(grid, world.rank(), kv_sharers);
  const std::string role = is_student(grid.places[std::size_t(world.rank())].role) ? "students" : "teachers";
  const auto group = [&](const char* name, const Seat& seat) {
    return world.split(seat.color, seat.key, text(name, " ", seat.color / 2, " of ", role));
  };
  Groups groups;
  groups.role = world.split(seats.role.color, seats.role.key, role);
  groups.tp = group("tp", seats.tp);
  groups.dp = group("dp", seats.dp);
  groups.pp_forward = group("pp", seats.pp);
  groups.pp_backward = group("pp (backward)", seats.pp);
  groups.kv = group("kv", seats.kv);
  groups.tied = group("tied embeddings", seats.tied);
  groups.partners = world.split(seats.partners.color, seats.partners.key, "partners");
  return groups;
}

void Groups::set_patience(const Patience& patience) {
  for (const auto* group : {&role, &tp, &dp, &pp_forward, &pp_backward, &kv, &tied, &partners})
    if (*group) (*group)->set_patience(patience);
}

std::map<int, std::size_t> group_bytes(const Grid& grid, int kv_sharers) {
  constexpr std::pair<Seat Seats::*, int> kinds[] = {{&Seats::role, 1},    {&Seats::tp, 1}, {&Seats::dp, 1},
                                                     {&Seats::pp, 2},      {&Seats::kv, 1}, {&Seats::tied, 1},
                                                     {&Seats::partners, 1}};
  std::map<int, std::size_t> bytes;
  for (const auto& [kind, copies] : kinds) {
    std::map<int, std::vector<int>> nodes_by_color;
    for (int rank = 0; rank < int(grid.places.size()); ++rank)
      if (const Seat seat = seats_of(grid, rank, kv_sharers).*kind; seat.color >= 0)
        nodes_by_color[seat.color].push_back(grid.places[std::size_t(rank)].node);
    for (const auto& [_, nodes] : nodes_by_color)
      if (nodes.size() > 1 && std::all_of(nodes.begin(), nodes.end(), [&](int n) { return n == nodes.front(); }))
        bytes[nodes.front()] += std::size_t(copies) * shared_group_bytes(int(nodes.size()));
  }
  return bytes;
}

}  // namespace distill
