// Signs of life between processes of one node: a counter in shared memory that a small thread keeps moving, and the
// process id. A killed process is noticed at once, a stopped one after peer_dead_after.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

namespace distill {

// In shared memory, one per process; zeroed memory is a process that has not signed yet.
struct alignas(64) LifeSign {
  std::atomic<std::uint64_t> beats;
  std::atomic<std::int64_t> pid;
  std::atomic<std::uint64_t> pid_space;  // process ids mean something only within one pid namespace
  std::atomic<std::uint64_t> wants_stop;  // asked by a signal to end the run

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

// Moves the counter of this process until destroyed.
class Heart {
 public:
  explicit Heart(LifeSign& sign, std::chrono::milliseconds period = std::chrono::milliseconds(100));
  ~Heart();
  Heart(const Heart&) = delete;
  Heart& operator=(const Heart&) = delete;

 private:
  Descriptor wake_;
  std::thread thread_;
};

// Looks at the sign of another process, which has signed.
class PeerWatch {
 public:
  explicit PeerWatch(const LifeSign& sign);
  // Empty while it lives. Only the time between calls that are close to each other counts as silence.
  std::string trouble(std::chrono::milliseconds dead_after);

 private:
  bool ended() const;

  const LifeSign* sign_;
  std::int64_t pid_;
  bool same_pid_space_;
  Descriptor process_;  // pidfd: readable once the process has ended
  std::uint64_t beats_ = 0;
  std::chrono::steady_clock::time_point last_;
  std::chrono::steady_clock::duration silent_{0};
};

// Whether the ranks of a run still live. Several threads may ask.
class Lives {
 public:
  virtual ~Lives() = default;
  // Empty while the rank lives or nothing is known about it.
  virtual std::string trouble(int world_rank, std::chrono::milliseconds dead_after) = 0;
};

// The ranks of this node by their signs of life; nothing is known about others.
class NodeLives final : public Lives {
 public:
  // signs: a table of `count` LifeSigns in shared memory; this process signs at `mine` and its heart begins to beat.
  NodeLives(std::shared_ptr<std::byte> signs, std::size_t count, std::size_t mine);
  // The rank whose sign is at `index`; it has signed.
  void watch(int world_rank, std::size_t index);
  std::string trouble(int world_rank, std::chrono::milliseconds dead_after) override;
  void ask_to_stop() { at(mine_).wants_stop.store(1, std::memory_order_relaxed); }  // any thread
  // Of any rank of this node.
  bool stop_asked() const;

 private:
  LifeSign& at(std::size_t index) const;

  std::shared_ptr<std::byte> signs_;
  std::size_t count_, mine_;
  Heart heart_;
  std::mutex mutex_;
  std::map<int, PeerWatch> watches_;
};

}  // namespace distill
