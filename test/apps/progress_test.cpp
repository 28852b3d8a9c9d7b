#include "apps/progress.h"

#include <catch2/catch.hpp>
#include <sstream>

using namespace distill;
using namespace std::chrono_literals;

TEST_CASE("a terminal shows progress in one line that is written over and taken away") {
  std::ostringstream out;
  Progress progress(out, /*is_terminal=*/true);
  progress("1 of 3");
  progress("2 of 3");
  progress("");
  CHECK(out.str() == "\r\033[K1 of 3\r\033[K2 of 3\r\033[K");
}

TEST_CASE("elsewhere progress is a line every ten seconds, and nothing for what is quick") {
  std::ostringstream out;
  Progress::Clock::time_point now{};
  Progress progress(out, /*is_terminal=*/false, [&] { return now; });
  const auto at = [&](std::chrono::seconds time, const std::string& line) {
    now = Progress::Clock::time_point(time);
    progress(line);
  };
  at(0s, "a");
  at(9s, "b");
  CHECK(out.str().empty());
  at(10s, "c");
  at(19s, "d");
  at(21s, "e");
  at(40s, "");
  CHECK(out.str() == "c\ne\n");
}
