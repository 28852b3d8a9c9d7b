#include "parallel/wait.h"

#include <sched.h>

#include <algorithm>
#include <thread>

namespace distill {

namespace {

using namespace std::chrono_literals;

constexpr auto spin_for = 2us, yield_for = 50us, shortest_nap = 20us, longest_nap = 1000us, look_every = 20'000us;

void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Nap::Nap() : last_(Clock::now()), next_look_(look_every) {}

bool Nap::take() {
  if (waited_ < spin_for)
    pause_core();
  else if (waited_ < yield_for)
    sched_yield();
  else
    std::this_thread::sleep_for(std::clamp<Clock::duration>(waited_ / 8, shortest_nap, longest_nap));
  const Clock::time_point now = Clock::now();
  waited_ += std::min<Clock::duration>(now - last_, 1s);
  last_ = now;
  if (waited_ < next_look_) return false;
  next_look_ = waited_ + look_every;
  return true;
}

void Nap::look(const Patience& patience, const Awaited& awaited, const std::string& trouble) {
  if (!trouble.empty())
    throw Error(ExitCode::peer_lost, text(awaited.whom(), " ", trouble, "; ", awaited.self(), " waited ", seconds(),
                                          " s for it in ", awaited.purpose()));
  if (waited_ >= patience.peer_timeout)
    throw Error(ExitCode::peer_lost, text(awaited.self(), " waited ", seconds(), " s for ", awaited.whom(), " in ",
                                          awaited.purpose(), ": it lives but gives nothing (peer_timeout)"));
  if (waited_ >= patience.stall_report && !reported_) {
    reported_ = true;
    patience.say(text(awaited.self(), " has waited ", seconds(), " s for ", awaited.whom(), " in ", awaited.purpose(),
                      " and goes on waiting"));
  }
}

}  // namespace distill
