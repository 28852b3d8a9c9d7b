// Who does what: from the number of ranks, the node of each and the sizes of the grid to a role and coordinates for
// every rank. Pure functions; every rank computes the same.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/communicator.h"

namespace distill {

enum class Role { student, teacher, both };  // both: a world of one plays the two in turn
std::string_view name_of(Role role);
inline bool is_student(Role role) { return role != Role::teacher; }
inline bool is_teacher(Role role) { return role != Role::student; }

struct GridSizes {
  int tp = 1, pp = 1, dp = 1;
};

// Where a rank stands. Coordinates are those within its role; partners have equal ones.
struct Place {
  Role role = Role::student;
  int tp_rank = 0, dp_rank = 0, pp_rank = 0;
  int node = 0;
  int partner =
      -1;  // world rank of the teacher of a student and the other way round; itself for both, −1 without teacher
};

struct Grid {
  GridSizes sizes;
  std::vector<Place> places;  // by world rank
};

// nodes: the node of each rank, any numbers. tp and pp are given, dp follows: ranks of a role / (tp·pp). With a teacher
// the first half of each node's ranks are students and the second half teachers. Grid order, fastest first: tp, dp, pp.
// A count that does not fit is an input error. hosts: the name of each rank's node for
// that message, or empty.
Grid make_grid(std::span<const int> nodes, int tp, int pp, bool has_teacher, std::span<const std::string> hosts = {});

// The nodes of a world, and their names; by rank.
std::vector<int> nodes_of(const Communicator& world);
std::vector<std::string> hosts_of(const Communicator& world);

// A small table of it, a line per rank, and which ranks form its groups. is_tied: the student's head is its embedding.
// hosts: by world rank, or empty.
std::string describe(const Grid& grid, bool is_tied, std::span<const std::string> hosts = {});

// The groups that this rank takes part in. Every rank of world calls it, and all are split from world: where shared
// memory runs out for one group, all ranks throw that one CommonError.
struct Groups {
  std::unique_ptr<Communicator> role;  // all students, or all teachers; by pp, dp and tp coordinate
  std::unique_ptr<Communicator> tp, dp;
  std::unique_ptr<Communicator> pp_forward, pp_backward;  // the same ranks, one for each direction
  std::unique_ptr<Communicator> kv;                       // tensor-parallel neighbours that share key/value heads
  std::unique_ptr<Communicator> tied;      // a student's first and last stage; null on others and where these are one
  std::unique_ptr<Communicator> partners;  // a student and its teacher; null where there is one role

  void set_patience(const Patience& patience);  // of all of them
};
// kv_sharers: tensor-parallel ranks that hold the same key/value heads.
Groups make_groups(Communicator& world, const Grid& grid, int kv_sharers);
// Shared memory that they take on each node (Place::node), beside what the world itself has. A pure function.
std::map<int, std::size_t> group_bytes(const Grid& grid, int kv_sharers);

// Rank in Groups::role of a coordinate.
int role_rank(const GridSizes& sizes, const Place& place);

}  // namespace distill
