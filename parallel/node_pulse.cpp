#include "parallel/node_pulse.h"

#include <ifaddrs.h>
#include <net/if.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <iostream>
#include <utility>

#include "core/error.h"

namespace distill {

namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds period(200), heard_by(10'000);

// What a packet begins with, after the secret; then a beat per rank.
struct Header {
  std::uint32_t node, ranks;
};

// Those that another node may reach: every one of them is told, any is enough. Loopback where there is nothing else.
std::vector<sockaddr_in> own_addresses(in_port_t port) {
  std::vector<sockaddr_in> outer, loopback;
  ifaddrs* first = nullptr;
  check(getifaddrs(&first) == 0, "getifaddrs: ", std::strerror(errno));
  const std::unique_ptr<ifaddrs, decltype(&freeifaddrs)> owned(first, freeifaddrs);
  for (const ifaddrs* one = first; one; one = one->ifa_next) {
    if (!one->ifa_addr || one->ifa_addr->sa_family != AF_INET || !(one->ifa_flags & IFF_UP)) continue;
    sockaddr_in address;
    std::memcpy(&address, one->ifa_addr, sizeof address);
    address.sin_port = port;
    (one->ifa_flags & IFF_LOOPBACK ? loopback : outer).push_back(address);
  }
  return outer.empty() ? loopback : outer;
}

std::vector<sockaddr_in> addresses_of(const std::string& card) {
  std::vector<sockaddr_in> addresses(card.size() / sizeof(sockaddr_in));
  if (!addresses.empty()) std::memcpy(addresses.data(), card.data(), addresses.size() * sizeof(sockaddr_in));
  return addresses;
}

}  // namespace

NodePulse::NodePulse() : socket_(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)) {
  check(bool(socket_), "a socket for signs of life: ", std::strerror(errno));
  sockaddr_in any{};
  any.sin_family = AF_INET;  // any address, any port
  socklen_t length = sizeof any;
  auto* const address = reinterpret_cast<sockaddr*>(&any);
  check(bind(socket_.get(), address, length) == 0 && getsockname(socket_.get(), address, &length) == 0,
        "a port for signs of life: ", std::strerror(errno));
  const std::vector<sockaddr_in> own = own_addresses(any.sin_port);
  card_.assign(reinterpret_cast<const char*>(own.data()), own.size() * sizeof(sockaddr_in));
}

std::string NodePulse::make_secret() {
  std::string secret(16, '\0');
  check(getrandom(secret.data(), secret.size(), 0) == ssize_t(secret.size()), "getrandom: ", std::strerror(errno));
  return secret;
}

void NodePulse::start(std::vector<Station> stations, std::size_t own, std::shared_ptr<void> table, std::string secret) {
  for (const Station& station : stations) nodes_.push_back({station.name, addresses_of(station.card), station.signs});
  own_ = own;
  table_ = std::move(table);
  secret_ = std::move(secret);
  thread_ = std::make_unique<SmallThread>([this](int stop) { beat(stop); });
}

void NodePulse::beat(int stop) {
  pollfd events[]{{stop, POLLIN, 0}, {socket_.get(), POLLIN, 0}};
  const Clock::time_point start = Clock::now();
  bool is_reported = false;
  for (auto next = start;;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(next - Clock::now());
    if (left <= 0ms) {
      tell();
      next = Clock::now() + period;
      if (!is_reported && Clock::now() - start > heard_by) {
        report_unheard();
        is_reported = true;
      }
      continue;
    }
    if (poll(events, 2, int(left.count())) <= 0) continue;
    if (events[0].revents != 0) return;
    listen();
  }
}

void NodePulse::tell() const {
  const std::span<LifeSign> signs = nodes_[own_].signs;
  const Header header{std::uint32_t(own_), std::uint32_t(signs.size())};
  std::string packet = secret_;
  packet.append(reinterpret_cast<const char*>(&header), sizeof header);
  for (const LifeSign& sign : signs) {
    const std::uint64_t beats = sign.beats.load(std::memory_order_relaxed);
    packet.append(reinterpret_cast<const char*>(&beats), sizeof beats);
  }
  // What does not arrive is silence, whatever the reason.
  for (const Peer& node : nodes_)
    if (&node != &nodes_[own_])
      for (const sockaddr_in& to : node.addresses)
        sendto(socket_.get(), packet.data(), packet.size(), 0, reinterpret_cast<const sockaddr*>(&to), sizeof to);
}

void NodePulse::listen() {
  std::string packet(1 << 16, '\0');
  for (ssize_t length; (length = recv(socket_.get(), packet.data(), packet.size(), 0)) >= 0;) {
    Header header;
    const std::size_t beats_at = secret_.size() + sizeof header;
    if (std::size_t(length) < beats_at || packet.compare(0, secret_.size(), secret_) != 0) continue;
    std::memcpy(&header, packet.data() + secret_.size(), sizeof header);
    if (header.node >= nodes_.size() || header.node == own_) continue;
    Peer& node = nodes_[header.node];
    if (header.ranks != node.signs.size() || std::size_t(length) != beats_at + header.ranks * sizeof(std::uint64_t))
      continue;
    node.is_heard = true;
    for (std::size_t i = 0; i < node.signs.size(); ++i) {
      std::uint64_t beats;
      std::memcpy(&beats, packet.data() + beats_at + i * sizeof beats, sizeof beats);
      node.signs[i].beats.store(beats, std::memory_order_relaxed);
    }
  }
}

void NodePulse::report_unheard() const {
  for (const Peer& node : nodes_)
    if (&node != &nodes_[own_] && !node.is_heard)
      std::cerr << text("warning: ", nodes_[own_].name, " hears no signs of life from ", node.name,
                        " (UDP between any ports): if it is lost, only mpirun and peer_timeout will end the run\n")
                << std::flush;
}

}  // namespace distill
