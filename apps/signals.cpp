#include "apps/signals.h"

#include <pthread.h>

#include <csignal>
#include <mutex>
#include <thread>
#include <utility>

namespace distill {

namespace {

std::mutex mutex;
std::function<void()> handler;  // empty: a signal ends the process

void end_process(int number, const sigset_t& signals) {
  std::signal(number, SIG_DFL);
  pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
  std::raise(number);
}

void wait_for_signals(const sigset_t& signals) {
  for (int number = 0; sigwait(&signals, &number) == 0;) {
    const std::lock_guard lock(mutex);
    handler ? handler() : end_process(number, signals);
  }
}

}  // namespace

void take_stop_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int number : {SIGINT, SIGTERM, SIGUSR1}) sigaddset(&signals, number);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::thread(wait_for_signals, signals).detach();  // it waits until the process ends
}

StopSignals::StopSignals(std::function<void()> on_signal) {
  const std::lock_guard lock(mutex);
  handler = std::move(on_signal);
}

StopSignals::~StopSignals() {
  const std::lock_guard lock(mutex);
  handler = nullptr;
}

}  // namespace distill
