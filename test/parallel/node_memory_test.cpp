// One copy per node: threads and processes of a node see the same physical memory, nodes do not mix, and too little
// shared memory is one error for all.
#include <algorithm>
#include <catch2/catch.hpp>
#include <fstream>
#include <sstream>
#include <thread>

#include "parallel/parallel.h"
#include "parallel/shared_group.h"
#include "test/support/mpi_main.h"

using namespace distill;
using Catch::Matchers::Contains;

namespace {

// Device and inode of the file that an address is mapped from: the same for all who share it, whatever its addresses.
std::string mapping_of(const void* address) {
  std::ifstream maps("/proc/self/maps");
  for (std::string row; std::getline(maps, row);) {
    std::uintptr_t begin = 0, end = 0;
    char dash = 0;
    std::string rights, offset, device, inode;
    std::istringstream(row) >> std::hex >> begin >> dash >> end >> rights >> offset >> device >> inode;
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    if (begin <= at && at < end) return device + " " + inode;
  }
  return "not mapped";
}

std::vector<std::byte> bytes(std::size_t n, int seed) {
  std::vector<std::byte> out(n);
  for (std::size_t i = 0; i < n; ++i) out[i] = std::byte(seed + int(i * 7 % 251));
  return out;
}

struct NobodyDies final : Lives {
  std::string trouble(int, std::chrono::milliseconds) override { return {}; }
};

// As run_ranks, on pretended nodes.
void run_ranks_on(const std::vector<int>& nodes, const std::function<void(Communicator&)>& body) {
  const auto memory = heap_memory();
  const auto lives = std::make_shared<NobodyDies>();
  std::string ticket;
  const int n = int(nodes.size());
  const GroupMemory::Block block = memory->make(shared_group_bytes(n), "world", ticket);
  std::vector<Member> members;
  for (int r = 0; r < n; ++r) members.push_back({r, nodes[std::size_t(r)], "a host", 1});
  std::vector<std::thread> threads;
  for (int r = 0; r < n; ++r)
    threads.emplace_back([&, r] { body(*first_shared_group("world", r, members, {}, block, lives, memory)); });
  for (std::thread& thread : threads) thread.join();
}

// What every rank of a world must see.
void check_sharing(Communicator& world) {
  const int node = world.members()[std::size_t(world.rank())].node;
  const std::vector<std::byte> first = bytes(100'000, node), second = bytes(17, node + 1);
  const bool gives = ranks_of_node(world).front() == world.rank();
  const NodeData mine = gives ? NodeData{{first, {}, second}, nullptr} : NodeData{};
  const NodeData shared = share_in_node(world, mine, "a test");
  check(shared.parts.size() == 3 && shared.parts[1].empty(), "parts");
  check(std::ranges::equal(shared.parts[0], first) && std::ranges::equal(shared.parts[2], second), "content");
  check(std::uintptr_t(shared.parts[0].data()) % 8 == 0 && std::uintptr_t(shared.parts[2].data()) % 8 == 0, "boundary");
  const std::vector<std::string> places = world.all_gather(mapping_of(shared.parts[0].data()));
  const std::vector<int> here = ranks_of_node(world);
  if (here.size() == 1) return check(shared.parts[0].data() == first.data(), "a copy where none is needed");
  check(places[std::size_t(world.rank())] != "not mapped", "/proc/self/maps lacks an address");
  for (int r = 0; r < world.size(); ++r) {
    const bool same_node = world.members()[std::size_t(r)].node == node;
    check((places[std::size_t(r)] == places[std::size_t(world.rank())]) == same_node, "rank ", r, " maps ",
          places[std::size_t(r)]);
  }
}

}  // namespace

TEST_CASE("ranks of a node see one piece of memory", "[node_memory]") {
  for (const int n : {1, 2, 16}) run_ranks(n, check_sharing);
}

TEST_CASE("each node has its own", "[node_memory]") {
  run_ranks_on({0, 1, 0, 1, 2, 0}, check_sharing);
  run_ranks_on({0, 1}, check_sharing);
}

TEST_CASE("memory stays while any rank keeps it, and leaves no name behind", "[node_memory]") {
  run_ranks(3, [](Communicator& world) {
    const std::vector<std::byte> data = bytes(5000, 1);
    NodeData shared = share_in_node(world, world.rank() == 0 ? NodeData{{data}, nullptr} : NodeData{}, "a test");
    world.barrier();
    if (world.rank() != 2) shared = {};
    world.barrier();
    if (world.rank() == 2) check(std::ranges::equal(shared.parts[0], data), "content");
  });
}

TEST_CASE("too little shared memory names the bytes, once", "[node_memory]") {
  const std::span<const std::byte> huge(reinterpret_cast<const std::byte*>(64), std::size_t(1) << 52);
  CHECK_THROWS_WITH(run_ranks(3,
                              [&](Communicator& world) {
                                try {
                                  share_in_node(world, {{huge}, nullptr}, "the encoded data of x");
                                } catch (const CommonError& error) {
                                  check(error.code() == ExitCode::bad_input, "exit code");
                                  throw;
                                }
                              }),
                    Contains("the encoded data of x needs 4503599627370560 bytes of shared memory, /dev/shm has"));
}

TEST_CASE("processes of a node see one piece of memory", "[mpi][node_memory]") {
  check_sharing(test_session().world());
}
