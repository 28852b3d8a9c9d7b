// How far something long is, for people who watch and for logs.
#pragma once

#include <chrono>
#include <functional>
#include <iosfwd>
#include <string>

namespace distill {

// On a terminal one line that is written over; elsewhere a line of its own every ten seconds, so that what is quick
// leaves nothing behind.
class Progress {
 public:
  using Clock = std::chrono::steady_clock;

  Progress(std::ostream& out, bool is_terminal, std::function<Clock::time_point()> now = Clock::now);
  // An empty line takes the last one off the terminal.
  void operator()(const std::string& line);

 private:
  std::ostream* out_;
  bool is_terminal_;
  std::function<Clock::time_point()> now_;
  Clock::time_point last_;
};

}  // namespace distill
