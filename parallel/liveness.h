// Signs of life. Between processes of one node: a counter in shared memory that a small thread keeps moving, and the
// process id; a killed process is noticed at once, a stopped one after peer_dead_after. Of processes of other nodes
// there is a copy of that counter, which node_pulse.h moves.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>

namespace distill {

// In shared memory, one per process; zeroed memory is a process that has not signed yet. Of a process of another node
// only the beats are known.
struct alignas(64) LifeSign {
  std::atomic<std::uint64_t> beats;
  std::atomic<std::int64_t> pid;
  std::atomic<std::uint64_t> pid_space;   // process ids mean something only within one pid namespace
  std::atomic<std::uint64_t> wants_stop;  // asked by a signal to end the run
  std::atomic<std::uint64_t> said_why;    // ends the run and has printed the reason

  LifeSign& sign();  // as this process
};

// A file descriptor that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  Descriptor& operator=(Descriptor&& other) noexcept;
  ~Descriptor();
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_;
};

// A thread that takes no signals. Its body returns when the descriptor it is given becomes readable.
class SmallThread {
 public:
  explicit SmallThread(std::function<void(int stop)> body);
  ~SmallThread();
  SmallThread(const SmallThread&) = delete;
  SmallThread& operator=(const SmallThread&) = delete;

 private:
  Descriptor wake_;
  std::thread thread_;
};

// Moves the counter of this process until destroyed.
class Heart {
 public:
  explicit Heart(LifeSign& sign, std::chrono::milliseconds period = std::chrono::milliseconds(100));

 private:
  SmallThread thread_;
};

// How long a sign has not moved. Only the time between looks that are close to each other counts, so that the time in
// which this process itself was stopped does not.
class Silence {
 public:
  using Duration = std::chrono::steady_clock::duration;
  // counts: whether the time since the last look does.
  Duration look(const LifeSign& sign, bool counts = true);
  Duration so_far() const { return silent_; }

 private:
  std::uint64_t beats_ = 0;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
  Duration silent_{0};
};

// Looks at the sign of another process of this node, which has signed.
class PeerWatch {
 public:
  explicit PeerWatch(const LifeSign& sign);
  // Empty while it lives.
  std::string trouble(std::chrono::milliseconds dead_after);
  Silence::Duration silent() const { return silence_.so_far(); }

 private:
  bool ended() const;

  const LifeSign* sign_;
  std::int64_t pid_;
  bool same_pid_space_;
  Descriptor process_;  // pidfd: readable once the process has ended
  Silence silence_;
};

// Whether the ranks of a run still live. Several threads may ask.
class Lives {
 public:
  virtual ~Lives() = default;
  // Empty while the rank lives or nothing is known about it.
  virtual std::string trouble(int world_rank, std::chrono::milliseconds dead_after) = 0;
};

// The ranks of this node by their signs of life, and those of other nodes by what is heard of them.
class NodeLives final : public Lives {
 public:
  // signs: a table of `count` LifeSigns in shared memory; this process signs at `mine` and its heart begins to beat.
  NodeLives(std::shared_ptr<std::byte> signs, std::size_t count, std::size_t mine);
  // The rank whose sign is at `index`; it has signed.
  void watch(int world_rank, std::size_t index);
  // A rank of another node, whose sign `listener`, a rank of this node, moves. Nothing is known before it is heard.
  void watch_far(int world_rank, int node, std::size_t index, int listener);
  // From now on, whatever this process is doing, a small thread looks after the other nodes. When all ranks of one have
  // been silent for dead_after it calls `lost`, once, with the lowest of them and what is wrong with it.
  using Lost = std::function<void(int world_rank, const std::string& trouble)>;
  void watch_nodes(std::chrono::milliseconds dead_after, Lost lost);
  // The same for the ranks of this node that have been silent for so long.
  void watch_neighbours(std::chrono::milliseconds dead_after, Lost lost);
  // Returns when `lost` is not called any more.
  void end_watch() {
    watcher_.reset();
    neighbour_watcher_.reset();
  }
  std::string trouble(int world_rank, std::chrono::milliseconds dead_after) override;
  // Whether a rank of another node was found silent. Any thread.
  bool has_lost_far() const { return has_lost_far_; }
  void ask_to_stop() { at(mine_).wants_stop.store(1, std::memory_order_relaxed); }  // any thread
  void say_why() { at(mine_).said_why.store(1, std::memory_order_relaxed); }        // any thread
  // Of any rank of this node.
  bool stop_asked() const { return is_set(&LifeSign::wants_stop); }
  bool has_said_why() const { return is_set(&LifeSign::said_why); }

 private:
  struct Far {
    int node;
    std::size_t index;
    int listener;
    Silence silence;
  };

  LifeSign& at(std::size_t index) const;
  bool is_set(std::atomic<std::uint64_t> LifeSign::*word) const;
  std::string listener_trouble(const Far& far, std::chrono::milliseconds dead_after);
  Silence::Duration silence_of(Far& far);
  std::string far_trouble(Far& far, std::chrono::milliseconds dead_after);
  std::optional<std::pair<int, std::string>> lost_node(std::chrono::milliseconds dead_after);
  std::optional<std::pair<int, std::string>> lost_neighbour(std::chrono::milliseconds dead_after);

  std::shared_ptr<std::byte> signs_;
  std::size_t count_, mine_;
  Heart heart_;
  std::mutex mutex_;
  std::map<int, PeerWatch> watches_;
  std::map<int, Far> far_;
  std::atomic<bool> has_lost_far_ = false;
  std::unique_ptr<SmallThread> watcher_, neighbour_watcher_;  // last: they use all others
};

}  // namespace distill
