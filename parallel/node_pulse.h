// Signs of life between nodes: one rank of each node tells those of all other nodes several times a second, by UDP, how
// far the signs of its ranks are, and writes what it is told into the table of its own node (liveness.h). So a node
// that is switched off or unplugged falls silent on all others, whatever the message library makes of it.
#pragma once

#include <netinet/in.h>

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "parallel/liveness.h"

namespace distill {

// A node as the pulse of another sees it, or of its own.
struct Station {
  std::string name;           // for messages
  std::string card;           // NodePulse::card of the rank that speaks for it
  std::span<LifeSign> signs;  // of its ranks, in the table of the node that listens
};

class NodePulse {
 public:
  NodePulse();
  // How other nodes reach this one: its addresses and port, in bytes.
  const std::string& card() const { return card_; }
  // stations: every node; own: which of them is this one; table: keeps the memory of their signs. secret: the same on
  // all nodes, so that a stray packet is known from ours.
  void start(std::vector<Station> stations, std::size_t own, std::shared_ptr<void> table, std::string secret);

  static std::string make_secret();

 private:
  struct Peer {
    std::string name;
    std::vector<sockaddr_in> addresses;
    std::span<LifeSign> signs;
    bool is_heard = false;
  };

  void beat(int stop);
  void tell() const;
  void listen();
  void report_unheard() const;

  Descriptor socket_;
  std::string card_, secret_;
  std::vector<Peer> nodes_;
  std::size_t own_ = 0;
  std::shared_ptr<void> table_;
  std::unique_ptr<SmallThread> thread_;  // last: it uses all others
};

}  // namespace distill
