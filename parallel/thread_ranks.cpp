#include <unistd.h>

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "parallel/parallel.h"
#include "parallel/shared_group.h"

namespace distill {

namespace {

enum class Fate { running, finished, failed };

class ThreadLives final : public Lives {
 public:
  explicit ThreadLives(int n) : fates_(std::size_t(n)) {}
  void set(int rank, Fate fate) { fates_[std::size_t(rank)].store(fate, std::memory_order_release); }
  std::string trouble(int rank, std::chrono::milliseconds) override {
    switch (fates_[std::size_t(rank)].load(std::memory_order_acquire)) {
      case Fate::running:
        return {};
      case Fate::finished:
        return "has finished";
      case Fate::failed:
        return "has failed";
    }
    return {};
  }

 private:
  std::vector<std::atomic<Fate>> fates_;
};

}  // namespace

void run_ranks(int n, const std::function<void(Communicator& world)>& body, const Patience& patience) {
  check(n > 0, "run_ranks: ", n, " ranks");
  if (n == 1) {
    Alone world;
    return body(world);
  }
  const auto lives = std::make_shared<ThreadLives>(n);
  const auto memory = heap_memory();
  std::string ticket;
  const GroupMemory::Block block = memory->make(shared_group_bytes(n), "world", ticket);
  memory->seal(ticket);
  std::vector<Member> members;
  for (int r = 0; r < n; ++r) members.push_back({r, 0, "this host", getpid()});

  std::vector<std::exception_ptr> errors;  // in the order of failing: the first is the cause of the others
  std::mutex errors_mutex;
  std::vector<std::thread> threads;
  for (int r = 0; r < n; ++r)
    threads.emplace_back([&, r] {
      try {
        const auto world = first_shared_group("world", r, members, patience, block, lives, memory);
        body(*world);
        lives->set(r, Fate::finished);
      } catch (...) {
        const std::lock_guard lock(errors_mutex);
        errors.push_back(std::current_exception());
        lives->set(r, Fate::failed);
      }
    });
  for (std::thread& thread : threads) thread.join();
  if (!errors.empty()) std::rethrow_exception(errors.front());
}

}  // namespace distill
