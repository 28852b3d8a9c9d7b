#include "parallel/liveness.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <utility>

#include "core/error.h"

namespace distill {

namespace {

using namespace std::chrono_literals;

std::uint64_t own_pid_space() {
  struct stat info {};
  return stat("/proc/self/ns/pid", &info) == 0 ? info.st_ino : 0;
}

std::string no_sign_for(Silence::Duration silent, const char* reasons) {
  return text("has shown no sign of life for ", std::chrono::duration<double>(silent).count(), " s (", reasons,
              "; peer_dead_after)");
}

}  // namespace

LifeSign& LifeSign::sign() {
  pid_space.store(own_pid_space(), std::memory_order_relaxed);
  pid.store(getpid(), std::memory_order_relaxed);
  beats.fetch_add(1, std::memory_order_release);
  return *this;
}

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

Descriptor::~Descriptor() {
  if (fd_ >= 0) close(fd_);
}

SmallThread::SmallThread(std::function<void(int)> body) : wake_(eventfd(0, EFD_CLOEXEC)) {
  check(bool(wake_), "eventfd: ", std::strerror(errno));
  // Signals are for the threads that handle them.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  thread_ = std::thread(std::move(body), wake_.get());
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

SmallThread::~SmallThread() {
  const std::uint64_t one = 1;
  while (write(wake_.get(), &one, sizeof one) < 0 && errno == EINTR) {
  }
  thread_.join();
}

Heart::Heart(LifeSign& sign, std::chrono::milliseconds period)
    : thread_([&sign, period](int stop) {
        pollfd wake{stop, POLLIN, 0};
        do sign.beats.fetch_add(1, std::memory_order_relaxed);
        while (poll(&wake, 1, int(period.count())) <= 0);
      }) {}

Silence::Duration Silence::look(const LifeSign& sign, bool counts) {
  const auto now = std::chrono::steady_clock::now();
  const std::uint64_t beats = sign.beats.load(std::memory_order_relaxed);
  if (beats != beats_)
    silent_ = {};
  else if (counts)
    silent_ += std::min<Duration>(now - last_, 250ms);
  beats_ = beats;
  last_ = now;
  return silent_;
}

PeerWatch::PeerWatch(const LifeSign& sign)
    : sign_(&sign),
      pid_(sign.pid.load(std::memory_order_relaxed)),
      same_pid_space_(sign.pid_space.load(std::memory_order_relaxed) == own_pid_space()),
      process_(same_pid_space_ ? int(syscall(SYS_pidfd_open, pid_, 0)) : -1) {}

bool PeerWatch::ended() const {
  if (process_) {
    pollfd end{process_.get(), POLLIN, 0};
    return poll(&end, 1, 0) > 0;
  }
  return same_pid_space_ && kill(pid_t(pid_), 0) != 0 && errno == ESRCH;
}

std::string PeerWatch::trouble(std::chrono::milliseconds dead_after) {
  if (ended()) return "is gone: its process ended";
  const Silence::Duration silent = silence_.look(*sign_);
  if (silent < dead_after) return {};
  return no_sign_for(silent, "stopped, or its node hangs");
}

NodeLives::NodeLives(std::shared_ptr<std::byte> signs, std::size_t count, std::size_t mine)
    : signs_(std::move(signs)), count_(count), mine_(mine), heart_(at(mine).sign()) {}

bool NodeLives::is_set(std::atomic<std::uint64_t> LifeSign::*word) const {
  for (std::size_t i = 0; i < count_; ++i)
    if ((at(i).*word).load(std::memory_order_relaxed) != 0) return true;
  return false;
}

LifeSign& NodeLives::at(std::size_t index) const {
  return std::launder(reinterpret_cast<LifeSign*>(signs_.get()))[index];
}

void NodeLives::watch(int world_rank, std::size_t index) {
  const std::lock_guard lock(mutex_);
  watches_.emplace(world_rank, PeerWatch(at(index)));
}

void NodeLives::watch_far(int world_rank, int node, std::size_t index, int listener) {
  const std::lock_guard lock(mutex_);
  far_.emplace(world_rank, Far{node, index, listener, {}});
}

void NodeLives::watch_nodes(std::chrono::milliseconds dead_after, Lost lost) {
  if (far_.empty()) return;
  watcher_ = std::make_unique<SmallThread>([this, dead_after, lost = std::move(lost)](int stop) {
    pollfd wake{stop, POLLIN, 0};
    while (poll(&wake, 1, /*ms=*/100) <= 0)
      if (const auto found = lost_node(dead_after)) return lost(found->first, found->second);
  });
}

void NodeLives::watch_neighbours(std::chrono::milliseconds dead_after, Lost lost) {
  neighbour_watcher_ = std::make_unique<SmallThread>([this, dead_after, lost = std::move(lost)](int stop) {
    pollfd wake{stop, POLLIN, 0};
    while (poll(&wake, 1, /*ms=*/100) <= 0)
      if (const auto found = lost_neighbour(dead_after)) return lost(found->first, found->second);
  });
}

// Silence alone: a rank that ends by an error says so itself, and whoever started it ends the others.
std::optional<std::pair<int, std::string>> NodeLives::lost_neighbour(std::chrono::milliseconds dead_after) {
  const std::lock_guard lock(mutex_);
  for (auto& [rank, watch] : watches_) {
    const std::string trouble = watch.trouble(dead_after);
    if (watch.silent() >= dead_after) return std::pair(rank, trouble);
  }
  return std::nullopt;
}

std::string NodeLives::trouble(int world_rank, std::chrono::milliseconds dead_after) {
  const std::lock_guard lock(mutex_);
  if (const auto near = watches_.find(world_rank); near != watches_.end()) return near->second.trouble(dead_after);
  if (const auto far = far_.find(world_rank); far != far_.end()) return far_trouble(far->second, dead_after);
  return {};
}

std::string NodeLives::listener_trouble(const Far& far, std::chrono::milliseconds dead_after) {
  const auto listener = watches_.find(far.listener);
  return listener == watches_.end() ? "" : listener->second.trouble(dead_after);
}

// Where the listener itself is silent, nothing can be said about other nodes.
Silence::Duration NodeLives::silence_of(Far& far) {
  const auto listener = watches_.find(far.listener);
  const bool listens = listener == watches_.end() || listener->second.silent() < 500ms,
             was_heard = at(far.index).beats.load(std::memory_order_relaxed) != 0;
  return far.silence.look(at(far.index), listens && was_heard);
}

std::string NodeLives::far_trouble(Far& far, std::chrono::milliseconds dead_after) {
  if (const std::string trouble = listener_trouble(far, dead_after); !trouble.empty())
    return text("is no longer heard of: rank ", far.listener, ", which listens for this node, ", trouble);
  const Silence::Duration silent = silence_of(far);
  if (silent < dead_after) return {};
  has_lost_far_ = true;
  return no_sign_for(silent, "stopped, or its node is lost or out of reach");
}

std::optional<std::pair<int, std::string>> NodeLives::lost_node(std::chrono::milliseconds dead_after) {
  const std::lock_guard lock(mutex_);
  struct Node {
    int first_rank;
    Silence::Duration silent;  // of the rank that was heard last
  };
  std::map<int, Node> nodes;
  for (auto& [rank, far] : far_) {
    if (!listener_trouble(far, dead_after).empty()) return {};
    const Silence::Duration silent = silence_of(far);
    Node& node = nodes.emplace(far.node, Node{rank, silent}).first->second;
    node.silent = std::min(node.silent, silent);
  }
  for (const auto& [_, node] : nodes)
    if (node.silent >= dead_after) {
      has_lost_far_ = true;
      return {{node.first_rank, no_sign_for(node.silent, "its node is lost or out of reach")}};
    }
  return {};
}

}  // namespace distill
