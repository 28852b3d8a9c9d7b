// Waiting for another rank without burning the core: a few µs of spinning, then naps that grow with the time waited,
// and an end when the other is dead or gives nothing for too long.
#pragma once

#include <chrono>
#include <string>

#include "core/communicator.h"

namespace distill {

// Who waits for whom, for messages, and whether there is still hope.
class Awaited {
 public:
  virtual ~Awaited() = default;
  virtual std::string self() const = 0;     // "rank 0 on node-a (pid 10)"
  virtual std::string whom() const = 0;     // "rank 1 on node-a (pid 11)"
  virtual std::string purpose() const = 0;  // "all_reduce of world"
  // Empty while the other may still answer, else what is wrong with it: "is gone: its process ended".
  virtual std::string trouble() = 0;
};

// The time of one wait. Time in which this process itself did not run (stopped, suspended) does not count.
class Nap {
 public:
  Nap();
  // One more nap: an eighth of the time waited so far, at most 1 ms. True when it is time to look after the other.
  bool take();
  double seconds() const { return std::chrono::duration<double>(waited_).count(); }
  // After a look: throws when all hope is gone or patience is at an end, reports a stall once.
  void look(const Patience& patience, const Awaited& awaited, const std::string& trouble);

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point last_;
  Clock::duration waited_{0}, next_look_{0};
  bool reported_ = false;
};

// Waits until ready() holds and returns the seconds that took.
template <class Ready>
double wait_until(const Ready& ready, const Patience& patience, Awaited& awaited) {
  if (ready()) return 0;
  Nap nap;
  while (!ready()) {
    if (!nap.take()) continue;
    const std::string trouble = awaited.trouble();
    if (ready()) break;  // the last thing it did before its end was what we wait for
    nap.look(patience, awaited, trouble);
  }
  return nap.seconds();
}

}  // namespace distill
