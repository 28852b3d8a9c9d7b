// The main of tests under mpirun: a rank that fails fails the test, and so does a run with too few ranks.
#define CATCH_CONFIG_RUNNER
#include "test/support/mpi_main.h"

#include <catch2/catch.hpp>
#include <cstdlib>
#include <iostream>

namespace {

distill::MpiSession* session = nullptr;

int run(int argc, char** argv) {
  distill::Communicator& world = session->world();
  const char* expected = std::getenv("DISTILL_EXPECT_RANKS");
  if (expected != nullptr && std::atoi(expected) != world.size()) {
    std::cerr << "expected " << expected << " ranks, " << world.size() << " started\n";
    return 1;
  }
  distill::Patience patience;  // ranks that are out of step after a failed check should not wait for long
  patience.peer_timeout = std::chrono::seconds(60);
  world.set_patience(patience);
  return int(world.all_reduce(std::int64_t{Catch::Session().run(argc, argv)}, distill::Reduce::max));
}

}  // namespace

distill::MpiSession& test_session() { return *session; }

int main(int argc, char** argv) {
  distill::MpiSession mpi(argc, argv);
  session = &mpi;
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << distill::text("rank ", mpi.me().world_rank, ": ", error.what(), "\n");
    mpi.abort_all(1);
  }
}
