// Operations that run while their caller goes on: one after the other, in the order started, on a thread of their own.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

namespace distill {

// An operation under way. Its memory is the operation's until wait() has returned or this object is gone. Going without
// wait() it waits too, but throws nothing; while an exception passes, it gives the operation up instead of waiting for
// a rank that may in turn wait for this one.
class Pending {
 public:
  Pending() = default;
  virtual ~Pending() = default;
  Pending(const Pending&) = delete;
  Pending& operator=(const Pending&) = delete;
  // Returns when it is done; throws what it threw, or what an earlier one of its lane threw.
  virtual void wait() = 0;
  virtual bool is_done() const = 0;  // wait() would return or throw at once
};

// One thread at a time uses a lane; Pendings may outlive it. The first start makes the thread, which naps when idle.
// After a failure nothing more runs: every later operation fails with the first error.
class Lane {
 public:
  Lane();
  ~Lane();  // as stop()
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  std::unique_ptr<Pending> start(std::function<void()> work);
  // Waits for all that was started and throws the first error.
  void finish();
  // Waits for all that was started and ends the thread.
  void stop();

  // Nothing more begins; what waits for another rank is to ask is_given_up() and end with an error. Any thread.
  void give_up();
  bool is_given_up() const;

 private:
  struct State;
  class Started;

  std::shared_ptr<State> state_;
  std::uint64_t started_ = 0;
  std::thread thread_;
};

}  // namespace distill
