#include "apps/progress.h"

#include <ostream>
#include <utility>

namespace distill {

Progress::Progress(std::ostream& out, bool is_terminal, std::function<Clock::time_point()> now)
    : out_(&out), is_terminal_(is_terminal), now_(std::move(now)), last_(now_()) {}

void Progress::operator()(const std::string& line) {
  if (is_terminal_) {
    *out_ << "\r\033[K" << line << std::flush;
    return;
  }
  const Clock::time_point now = now_();
  if (line.empty() || now - last_ < std::chrono::seconds(10)) return;
  *out_ << line << std::endl;
  last_ = now;
}

}  // namespace distill
