// One copy of read-only data for all ranks of a node.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <sstream>

#include "parallel/parallel.h"
#include "parallel/shared_segment.h"

namespace distill {

namespace {

constexpr std::size_t line = 64;
constexpr std::size_t round_up(std::size_t n) { return (n + line - 1) / line * line; }

// What the other ranks need to find the segment and its parts.
struct Ticket {
  std::string name;
  std::vector<std::size_t> sizes;

  std::size_t bytes() const {
    return std::accumulate(sizes.begin(), sizes.end(), line,
                           [](std::size_t n, std::size_t s) { return n + round_up(s); });
  }
  std::string to_text() const {
    std::string words = name;
    for (const std::size_t size : sizes) words += text(' ', size);
    return words;
  }
  static Ticket from_text(const std::string& words) {
    Ticket ticket;
    std::istringstream in(words);
    in >> ticket.name;
    for (std::size_t size = 0; in >> size;) ticket.sizes.push_back(size);
    return ticket;
  }
};

// The parts as they lie in the segment, which they keep.
NodeData parts_of(SharedSegment segment, const std::vector<std::size_t>& sizes) {
  const auto owner = std::make_shared<const SharedSegment>(std::move(segment));
  NodeData data{{}, owner};
  const std::byte* at = owner->data();
  for (const std::size_t size : sizes) {
    data.parts.emplace_back(at, size);
    at += round_up(size);
  }
  return data;
}

}  // namespace

std::vector<int> ranks_of_node(const Communicator& world) {
  const std::vector<Member>& members = world.members();
  std::vector<int> here;
  for (int r = 0; r < world.size(); ++r)
    if (members[std::size_t(r)].node == members[std::size_t(world.rank())].node) here.push_back(r);
  return here;
}

NodeData share_in_node(Communicator& world, NodeData mine, const std::string& purpose) {
  const std::vector<int> here = ranks_of_node(world);
  const bool is_shared = here.size() > 1, is_maker = is_shared && here.front() == world.rank();
  Ticket ticket;
  SharedSegment segment;
  world.run_together([&] {
    if (!is_maker) return;
    for (const auto& part : mine.parts) ticket.sizes.push_back(part.size());
    segment = SharedSegment::create(ticket.bytes(), purpose);
    ticket.name = segment.name();
    std::byte* at = segment.data();
    for (const auto& part : mine.parts) {
      if (!part.empty()) std::memcpy(at, part.data(), part.size());
      at += round_up(part.size());
    }
  });
  const std::vector<std::string> tickets = world.all_gather(ticket.to_text());
  world.run_together([&] {
    if (!is_shared || is_maker) return;
    ticket = Ticket::from_text(tickets[std::size_t(here.front())]);
    segment = SharedSegment::open(ticket.name, ticket.bytes());
  });
  if (!is_shared) return mine;
  segment.unlink();
  return parts_of(std::move(segment), ticket.sizes);
}

}  // namespace distill
