// SIGINT, SIGTERM and SIGUSR1 ask a run to save and leave at the next step.
#pragma once

#include <functional>

namespace distill {

// First thing in main, before any library starts a thread: from now on a small thread of its own takes these signals,
// which no other sees. So no handler ever runs on the stack of a computing thread: f32 products of oneDNN point the
// stack register into the heap while they run, where a handler's frame would overwrite what lies there. A signal ends
// the process as it would without this, except in the life of a StopSignals.
void take_stop_signals();

// Calls on_signal, on the thread that takes the signals, for each of them. One at a time.
class StopSignals {
 public:
  explicit StopSignals(std::function<void()> on_signal);
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;
};

}  // namespace distill
