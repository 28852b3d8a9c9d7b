#include "apps/signals.h"

#include <csignal>
#include <initializer_list>

namespace distill {

namespace {

volatile std::sig_atomic_t came = 0;

void remember(int) { came = 1; }

}  // namespace

void catch_stop_signals() {
  for (const int number : {SIGINT, SIGTERM, SIGUSR1}) {
    struct sigaction action {};
    action.sa_handler = remember;
    action.sa_flags = SA_RESTART;
    sigaction(number, &action, nullptr);
  }
}

bool stop_signal_came() { return came != 0; }

}  // namespace distill
