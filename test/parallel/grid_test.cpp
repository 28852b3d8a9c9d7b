#include "parallel/grid.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <tuple>
#include <utility>

#include "parallel/parallel.h"
#include "parallel/shared_group.h"
#include "test/support/refusal.h"

using namespace distill;
using Catch::Matchers::StartsWith;

namespace {

std::vector<int> one_node(int n) { return std::vector<int>(std::size_t(n), 0); }

std::string refused(const std::vector<int>& nodes, int tp, int pp, bool has_teacher) {
  return test::refusal("", [&] { make_grid(nodes, tp, pp, has_teacher); });
}

}  // namespace

TEST_CASE("one rank plays both roles, or is a student where no teacher is wanted") {
  const Grid both = make_grid(one_node(1), 1, 1, true);
  CHECK(both.places[0].role == Role::both);
  CHECK(both.places[0].partner == 0);
  CHECK((is_student(Role::both) && is_teacher(Role::both)));
  const Grid student = make_grid(one_node(1), 1, 1, false);
  CHECK(student.places[0].role == Role::student);
  CHECK(student.places[0].partner == -1);
}

TEST_CASE("two ranks are a student and its teacher") {
  const Grid grid = make_grid(one_node(2), 1, 1, true);
  CHECK(grid.sizes.dp == 1);
  CHECK(grid.places[0].role == Role::student);
  CHECK(grid.places[0].partner == 1);
  CHECK(grid.places[1].role == Role::teacher);
  CHECK(grid.places[1].partner == 0);
}

TEST_CASE("without a teacher any number of ranks is data parallel") {
  const int n = GENERATE(1, 2, 3, 5, 8);
  const Grid grid = make_grid(one_node(n), 1, 1, false);
  CHECK(grid.sizes.dp == n);
  for (int r = 0; r < n; ++r) {
    CHECK(grid.places[std::size_t(r)].role == Role::student);
    CHECK(grid.places[std::size_t(r)].dp_rank == r);
    CHECK(grid.places[std::size_t(r)].partner == -1);
  }
}

TEST_CASE("each node is halved, whatever the numbers of its ranks") {
  // mpirun --map-by node: ranks go round the nodes; and nodes of different sizes
  const auto nodes = GENERATE(std::vector<int>{0, 1, 0, 1, 0, 1, 0, 1}, std::vector<int>{7, 7, 3, 3, 3, 3, 7, 7},
                              std::vector<int>{5, 5, 2, 2, 2, 2});
  const Grid grid = make_grid(nodes, 1, 1, true);
  for (std::size_t r = 0; r < nodes.size(); ++r) {
    const Place& place = grid.places[r];
    const Place& partner = grid.places[std::size_t(place.partner)];
    CHECK(std::size_t(partner.partner) == r);
    CHECK(nodes[std::size_t(place.partner)] == nodes[r]);
    CHECK(partner.node == place.node);
    CHECK(partner.role != place.role);
    CHECK(partner.dp_rank == place.dp_rank);
    if (place.role == Role::student) CHECK(int(r) < place.partner);
  }
}

TEST_CASE("every coordinate is taken once by each role, and tp groups stay inside a node") {
  const auto [tp, pp, dp, nodes_count, has_teacher] = GENERATE(table<int, int, int, int, bool>({{1, 1, 1, 1, true},
                                                                                                {2, 1, 2, 1, true},
                                                                                                {2, 2, 2, 2, true},
                                                                                                {4, 1, 1, 1, true},
                                                                                                {1, 4, 2, 2, true},
                                                                                                {2, 2, 1, 1, false},
                                                                                                {2, 3, 2, 3, false}}));
  const int total = (has_teacher ? 2 : 1) * tp * pp * dp;
  std::vector<int> nodes;
  for (int r = 0; r < total; ++r) nodes.push_back(r / (total / nodes_count));
  const Grid grid = make_grid(nodes, tp, pp, has_teacher);
  CHECK(grid.sizes.dp == dp);
  std::set<std::tuple<Role, int, int, int>> taken;
  std::map<std::tuple<Role, int, int>, std::set<int>> nodes_of_tp_group;
  for (std::size_t r = 0; r < nodes.size(); ++r) {
    const Place& place = grid.places[r];
    CHECK((place.tp_rank < tp && place.dp_rank < dp && place.pp_rank < pp));
    CHECK(taken.emplace(place.role, place.tp_rank, place.dp_rank, place.pp_rank).second);
    nodes_of_tp_group[{place.role, place.dp_rank, place.pp_rank}].insert(nodes[r]);
    if (has_teacher) {
      const Place& partner = grid.places[std::size_t(place.partner)];
      CHECK(std::tuple(partner.tp_rank, partner.dp_rank, partner.pp_rank) ==
            std::tuple(place.tp_rank, place.dp_rank, place.pp_rank));
    }
  }
  CHECK(int(taken.size()) == total);
  for (const auto& [_, on] : nodes_of_tp_group) CHECK(on.size() == 1);
}

TEST_CASE("tp is fastest, then dp, then pp") {
  const Grid grid = make_grid(one_node(12), 2, 3, false);
  const auto at = [&](int r) {
    const Place& place = grid.places[std::size_t(r)];
    return std::tuple(place.tp_rank, place.dp_rank, place.pp_rank);
  };
  CHECK(at(0) == std::tuple(0, 0, 0));
  CHECK(at(1) == std::tuple(1, 0, 0));
  CHECK(at(2) == std::tuple(0, 1, 0));
  CHECK(at(4) == std::tuple(0, 0, 1));
  CHECK(at(11) == std::tuple(1, 1, 2));
}

TEST_CASE("counts that do not fit are refused") {
  CHECK(refused(one_node(3), 1, 1, true) ==
        "3 ranks cannot be split into as many students as teachers; distill_loss_weight: 0 trains without a teacher on "
        "any number");
  CHECK(refused({0, 0, 1, 1, 1}, 1, 1, true) ==
        "3 ranks on node 1 cannot be split into as many students as teachers; distill_loss_weight: 0 trains without a "
        "teacher on any number");
  CHECK(refused({0, 1}, 1, 1, true) ==
        "1 rank on node 0 cannot be split into as many students as teachers; distill_loss_weight: 0 trains without a "
        "teacher on any number");
  CHECK(refused(one_node(6), 2, 1, true) ==
        "6 ranks cannot be cut into groups of tp_size 2 for students and for teachers (a group stays inside a node): "
        "start 4 or 8 ranks");
  CHECK(refused({0, 0, 0, 1, 1, 1}, 2, 1, false) ==
        "3 ranks on node 0 cannot be cut into groups of tp_size 2 (a group stays inside a node): start 2 or 4 ranks on "
        "node 0");
  const std::string hosts[] = {"node-a", "node-a", "node-b"};
  CHECK_THROWS_WITH(make_grid({{0, 0, 1}}, 1, 1, true, hosts), StartsWith("1 rank on node-b cannot be split"));
  CHECK_THROWS_WITH(make_grid(one_node(3), 1, 1, true, hosts), StartsWith("3 ranks cannot be split"));
  CHECK(refused(one_node(6), 1, 2, true) ==
        "6 ranks (half of them students) cannot be cut into grids of tp_size 1 x pp_size 2: start 4 or 8 ranks");
  CHECK(refused(one_node(1), 1, 2, true) ==
        "1 rank cannot be split into as many students as teachers; distill_loss_weight: 0 trains without a teacher on "
        "any "
        "number");
}

TEST_CASE("the table names every rank") {
  CHECK(describe(make_grid({{0, 0, 1, 1}}, 1, 1, true), true) ==
        "grid: tp 1, dp 2, pp 1, 4 ranks\n"
        "  rank  role     tp  dp  pp  partner  node\n"
        "     0  student   0   0   0        1  0\n"
        "     1  teacher   0   0   0        0  0\n"
        "     2  student   0   1   0        3  1\n"
        "     3  teacher   0   1   0        2  1\n"
        "  dp groups: 0 2 | 1 3\n");
  const std::string hosts[] = {"node-a"};
  CHECK(describe(make_grid(one_node(1), 1, 1, false), true, hosts) ==
        "grid: tp 1, dp 1, pp 1, 1 rank\n"
        "  rank  role     tp  dp  pp  partner  node\n"
        "     0  student   0   0   0        -  node-a\n");
}

TEST_CASE("under the table stand the groups") {
  const Grid grid = make_grid(one_node(24), 2, 3, true);
  const std::string untied = describe(grid, false), tied = describe(grid, true);
  CHECK(untied.substr(untied.find("  tp groups")) ==
        "  tp groups: 0 1 | 12 13 | 2 3 | 14 15 | 4 5 | 16 17 | 6 7 | 18 19 | 8 9 | 20 21 | 10 11 | 22 23\n"
        "  dp groups: 0 2 | 12 14 | 1 3 | 13 15 | 4 6 | 16 18 | 5 7 | 17 19 | 8 10 | 20 22 | 9 11 | 21 23\n"
        "  pp groups: 0 4 8 | 12 16 20 | 1 5 9 | 13 17 21 | 2 6 10 | 14 18 22 | 3 7 11 | 15 19 23\n");
  // Of students only.
  CHECK(tied == untied + "  embedding groups: 0 8 | 1 9 | 2 10 | 3 11\n");
  CHECK_THAT(describe(make_grid(one_node(64), 2, 1, false), true), Catch::Contains(" | 30 31 | … 32 in all\n"));
}

TEST_CASE("stages and ends of pipelines form groups") {
  run_ranks(6, [&](Communicator& world) {
    const Grid grid = make_grid(nodes_of(world), 2, 3, false);
    const Groups groups = make_groups(world, grid, /*kv_sharers=*/1);
    const Place& me = grid.places[std::size_t(world.rank())];
    check(groups.pp_forward->size() == 3 && groups.pp_forward->rank() == me.pp_rank, "pp group");
    check(groups.kv->size() == 1, "nobody shares heads");
    check(bool(groups.tied) == (me.pp_rank != 1), "first and last stage");
    if (groups.tied) check(groups.tied->size() == 2 && groups.tied->rank() == me.pp_rank / 2, "in that order");
    check(role_rank(grid.sizes, me) == groups.role->rank(), "rank among the students");
  });
}

TEST_CASE("groups follow the grid") {
  const bool has_teacher = GENERATE(true, false);
  run_ranks(8, [&](Communicator& world) {
    const Grid grid = make_grid(nodes_of(world), 2, 1, has_teacher);
    const Groups groups = make_groups(world, grid, /*kv_sharers=*/2);
    const Place& me = grid.places[std::size_t(world.rank())];
    check(groups.role->size() == (has_teacher ? 4 : 8), "role group of ", groups.role->size());
    check(groups.tp->size() == 2 && groups.tp->rank() == me.tp_rank, "tp group");
    check(groups.dp->size() == grid.sizes.dp && groups.dp->rank() == me.dp_rank, "dp group");
    check(groups.pp_forward->size() == 1 && groups.pp_backward->size() == 1, "pp groups");
    check(groups.kv->size() == 2 && groups.kv->rank() == me.tp_rank, "kv group");
    check(!groups.tied, "one stage has no second end");
    check(bool(groups.partners) == has_teacher, "partners");
    if (groups.partners) check(groups.partners->rank() == int(me.role), "the student comes first");
    const std::int64_t coordinates = groups.dp->all_reduce(std::int64_t{me.tp_rank * 10 + int(me.role) * 100});
    check(coordinates == groups.dp->size() * (me.tp_rank * 10 + int(me.role) * 100), "dp ranks differ in dp only");
  });
}

namespace {

// Memory of groups that says how much was made and what for, and has none for one purpose.
class ScarceMemory final : public GroupMemory {
 public:
  explicit ScarceMemory(std::string refused = "") : refused_(std::move(refused)) {}
  std::size_t made() const { return made_; }
  const std::set<std::string>& purposes() const { return purposes_; }

  Block make(std::size_t bytes, const std::string& purpose, std::string& ticket) override {
    check_input(purpose != refused_, purpose, ": no memory");
    const std::lock_guard lock(mutex_);
    made_ += bytes;
    purposes_.insert(purpose);
    return heap_->make(bytes, purpose, ticket);
  }
  Block attach(const std::string& ticket, std::size_t bytes) override { return heap_->attach(ticket, bytes); }
  void seal(const std::string& ticket) override { heap_->seal(ticket); }

 private:
  std::shared_ptr<GroupMemory> heap_ = heap_memory();
  std::string refused_;
  std::mutex mutex_;  // of what follows
  std::size_t made_ = 0;
  std::set<std::string> purposes_;
};

class AllLive final : public Lives {
  std::string trouble(int, std::chrono::milliseconds) override { return {}; }
};

// What each rank of the grid, a thread on its node, meets when the groups are made with this memory: "" or
// "code message".
std::vector<std::string> outcomes(const Grid& grid, int sharers, const std::shared_ptr<GroupMemory>& memory) {
  const int n = int(grid.places.size());
  std::string ticket;
  const GroupMemory::Block block = heap_memory()->make(shared_group_bytes(n), "world", ticket);
  std::vector<Member> members;
  for (int r = 0; r < n; ++r) members.push_back({r, 0, "here", 1});
  Patience patience;
  patience.peer_timeout = std::chrono::seconds(2);
  std::vector<std::string> met(static_cast<std::size_t>(n));
  std::vector<std::thread> threads;
  for (int r = 0; r < n; ++r)
    threads.emplace_back([&, r] {
      const auto world = first_shared_group("world", r, members, patience, block, std::make_shared<AllLive>(), memory);
      try {
        const Groups groups = make_groups(*world, grid, sharers);
        world->barrier();
      } catch (const CommonError& error) {
        met[std::size_t(r)] = text(int(error.code()), ' ', error.what());
      } catch (const std::exception& error) {
        met[std::size_t(r)] = text("for one rank: ", error.what());
      }
    });
  for (std::thread& thread : threads) thread.join();
  return met;
}

}  // namespace

TEST_CASE("where memory runs out for one group, every rank of either role says so, whichever group it is") {
  const Grid grid = make_grid(one_node(8), 2, 2, true);
  const auto enough = std::make_shared<ScarceMemory>();
  for (const std::string& met : outcomes(grid, 2, enough)) CHECK(met.empty());
  std::set<std::string> kinds;
  for (const std::string& purpose : enough->purposes()) {
    const std::vector<std::string> met = outcomes(grid, 2, std::make_shared<ScarceMemory>(purpose));
    CAPTURE(purpose);
    CHECK(met == std::vector<std::string>(grid.places.size(), text("2 ", purpose, ": no memory")));
    REQUIRE_THAT(purpose, StartsWith("group "));
    kinds.insert(purpose.substr(6, purpose.find(' ', 6) - 6));
  }
  CHECK(kinds == std::set<std::string>{"students", "teachers", "tp", "pp", "kv", "tied", "partners"});
}

TEST_CASE("the memory of groups is known before they are made") {
  const auto [ranks, tp, pp, sharers, has_teacher] = GENERATE(table<int, int, int, int, bool>(
      {{1, 1, 1, 1, true}, {2, 1, 1, 1, true}, {16, 4, 2, 2, true}, {12, 2, 3, 1, false}}));
  const Grid grid = make_grid(one_node(ranks), tp, pp, has_teacher);
  const auto memory = std::make_shared<ScarceMemory>();
  for (const std::string& met : outcomes(grid, sharers, memory)) CHECK(met.empty());
  const auto bytes = group_bytes(grid, sharers);
  CHECK((bytes.empty() ? 0 : bytes.at(0)) == memory->made());
}

TEST_CASE("groups across nodes take no shared memory") {
  // Two nodes of a student and its teacher each: only the partners share a node.
  const auto bytes = group_bytes(make_grid({{0, 0, 1, 1}}, 1, 1, true), 1);
  CHECK(bytes == std::map<int, std::size_t>{{0, shared_group_bytes(2)}, {1, shared_group_bytes(2)}});
}
