// SIGINT, SIGTERM and SIGUSR1 ask a run to save and leave at the next step.
#pragma once

namespace distill {

void catch_stop_signals();
bool stop_signal_came();

}  // namespace distill
