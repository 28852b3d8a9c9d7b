// Signs of life between nodes: they arrive, they stop, and what is not ours changes nothing.
#include "parallel/node_pulse.h"

#include <sys/socket.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <cstring>
#include <thread>

using namespace distill;
using namespace std::chrono_literals;

namespace {

// The table of a node, for two nodes of two ranks and of one.
struct Table {
  std::shared_ptr<LifeSign[]> signs{new LifeSign[3]{}};
  std::vector<Station> stations(const std::string& card_a, const std::string& card_b) const {
    return {{"node-a", card_a, {&signs[0], 2}}, {"node-b", card_b, {&signs[2], 1}}};
  }
};

bool comes(const std::function<bool()>& what) {
  for (int i = 0; i < 500; ++i, std::this_thread::sleep_for(10ms))
    if (what()) return true;
  return false;
}

}  // namespace

TEST_CASE("nodes hear each other, and silence when one ends") {
  const Table on_a, on_b;
  NodePulse a;
  auto b = std::make_unique<NodePulse>();
  const std::string secret = NodePulse::make_secret();
  on_a.signs[0].beats = 7;
  on_a.signs[1].beats = 8;
  on_b.signs[2].beats = 9;
  a.start(on_a.stations(a.card(), b->card()), 0, on_a.signs, secret);
  b->start(on_b.stations(a.card(), b->card()), 1, on_b.signs, secret);
  CHECK(comes([&] { return on_b.signs[0].beats == 7 && on_b.signs[1].beats == 8 && on_a.signs[2].beats == 9; }));
  on_b.signs[2].beats = 10;
  CHECK(comes([&] { return on_a.signs[2].beats == 10; }));
  b.reset();
  on_b.signs[2].beats = 11;
  std::this_thread::sleep_for(500ms);
  CHECK(on_a.signs[2].beats == 10);
}

TEST_CASE("packets that are not ours change nothing") {
  const Table table;
  NodePulse pulse;
  const std::string secret = NodePulse::make_secret();
  pulse.start(table.stations(pulse.card(), ""), 0, table.signs, secret);
  const Descriptor socket(::socket(AF_INET, SOCK_DGRAM, 0));
  sockaddr_in to;
  std::memcpy(&to, pulse.card().data(), sizeof to);
  const auto packet = [&](const std::string& from, std::uint32_t node, std::uint32_t ranks, std::size_t beats) {
    std::string bytes = from;
    bytes.append(reinterpret_cast<const char*>(&node), sizeof node);
    bytes.append(reinterpret_cast<const char*>(&ranks), sizeof ranks);
    const std::uint64_t beat = 99;
    for (std::size_t i = 0; i < beats; ++i) bytes.append(reinterpret_cast<const char*>(&beat), sizeof beat);
    REQUIRE(sendto(socket.get(), bytes.data(), bytes.size(), 0, reinterpret_cast<const sockaddr*>(&to), sizeof to) ==
            ssize_t(bytes.size()));
  };
  packet(std::string(16, 'x'), 1, 1, 1);
  packet(secret.substr(0, 5), 1, 1, 0);
  packet(secret, 2, 1, 1);      // there is no such node
  packet(secret, 0, 2, 2);      // itself
  packet(secret, 1, 2, 2);      // more ranks than it has
  packet(secret, 1, 1, 0);      // cut off
  packet(secret, 1, 1, 2);      // too long
  packet(secret, ~0u, ~0u, 1);  // far out
  std::this_thread::sleep_for(300ms);
  for (int i = 0; i < 3; ++i) CHECK(table.signs[std::size_t(i)].beats == 0);
  packet(secret, 1, 1, 1);
  CHECK(comes([&] { return table.signs[2].beats == 99; }));
}
