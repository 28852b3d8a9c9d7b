// A group of ranks that share memory: threads of one process, or processes of one node. Nothing but loads, stores and
// short naps; no message library takes part. See README.md for how the memory is cut and why the order of steps is
// safe.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "core/communicator.h"
#include "parallel/liveness.h"
#include "parallel/parallel.h"

namespace distill {

// Where groups get their memory from: one rank makes it, the others attach to it by its ticket, then it is sealed.
class GroupMemory {
 public:
  using Block = std::shared_ptr<std::byte>;
  virtual ~GroupMemory() = default;
  virtual Block make(std::size_t bytes, const std::string& purpose,
                     std::string& ticket) = 0;  // zeroed, 64-byte aligned
  virtual Block attach(const std::string& ticket, std::size_t bytes) = 0;
  virtual void seal(const std::string& ticket) = 0;  // by the maker, when all are attached
};

// POSIX shared memory, for processes of one node.
std::shared_ptr<GroupMemory> segment_memory();
// Heap, for threads of one process.
std::shared_ptr<GroupMemory> heap_memory();

// Every rank of parent calls it. ranks: those of parent that form the group, in its order; ranks of parent that take no
// part pass none and get none. All of a group lie on one node.
std::unique_ptr<Communicator> make_shared_group(Communicator& parent, const std::vector<int>& ranks, std::string name,
                                                std::shared_ptr<Lives> lives, std::shared_ptr<GroupMemory> memory);

// The first group of ranks that know each other by block and rank alone; shared_group_bytes(n) of zeroed memory.
std::unique_ptr<Communicator> first_shared_group(std::string name, int rank, std::vector<Member> members,
                                                 const Patience& patience, GroupMemory::Block block,
                                                 std::shared_ptr<Lives> lives, std::shared_ptr<GroupMemory> memory);

}  // namespace distill
