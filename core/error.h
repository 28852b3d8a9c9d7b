// Errors that carry their exit code. Throw where the trouble is seen; main() is the only handler.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace distill {

// What the process returns to its launcher (README, "Exit codes").
enum class ExitCode : int {
  ok = 0,
  internal = 1,    // a bug or a failure of the machine
  bad_input = 2,   // something the user wrote or pointed to; found before training starts
  peer_lost = 3,   // another rank died or gave nothing for too long
  non_finite = 4,  // max_nonfinite_steps steps in a row without a finite loss and gradient, or an outlier stops the run
  interrupted = 85  // saved after a signal or a time limit: the same command continues
};

class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ExitCode code() const { return code_; }

 private:
  ExitCode code_;
};

// "a", 3, 'c' → "a3c"
template <class... Part>
std::string text(const Part&... part) {
  std::ostringstream out;
  (out << ... << part);
  return out.str();
}

// For what a user can cause: name file, key or line, what was found and what is expected.
template <class... Part>
[[noreturn]] void fail_input(const Part&... part) {
  throw Error(ExitCode::bad_input, text(part...));
}
template <class... Part>
void check_input(bool ok, const Part&... part) {
  if (!ok) [[unlikely]]
    fail_input(part...);
}

// For what only a programmer or a broken machine can cause.
template <class... Part>
[[noreturn]] void fail(const Part&... part) {
  throw Error(ExitCode::internal, text(part...));
}
template <class... Part>
void check(bool ok, const Part&... part) {
  if (!ok) [[unlikely]]
    fail(part...);
}

}  // namespace distill
