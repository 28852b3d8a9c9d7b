// A group of real processes of which one dies or stops: the others end with a message, whatever they were doing.
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <thread>

#include "parallel/shared_group.h"
#include "parallel/shared_segment.h"
#include "test/support/child.h"

using namespace distill;
using namespace std::chrono_literals;
using Catch::Contains;

namespace {

using Clock = std::chrono::steady_clock;

// What processes need to become a group of n; made before they fork.
struct Cradle {
  int n;
  std::shared_ptr<SharedSegment> group, signs;
  explicit Cradle(int ranks) : n(ranks) {
    const auto make = [](std::size_t bytes) {
      const auto segment = std::make_shared<SharedSegment>(SharedSegment::create(bytes, "test"));
      segment->unlink();
      return segment;
    };
    group = make(shared_group_bytes(n));
    signs = make(std::size_t(n) * sizeof(LifeSign));
  }
  LifeSign& sign(int rank) const { return reinterpret_cast<LifeSign*>(signs->data())[rank]; }

  // In the process of a rank, when all have been forked.
  std::unique_ptr<Communicator> join(int rank, const Patience& patience) const {
    const auto lives = std::make_shared<NodeLives>(std::shared_ptr<std::byte>(signs, signs->data()), std::size_t(n),
                                                   std::size_t(rank));
    std::vector<Member> members;
    for (int r = 0; r < n; ++r) {
      while (sign(r).pid == 0) std::this_thread::sleep_for(1ms);
      members.push_back({r, 0, "node-a", long(sign(r).pid)});
      if (r != rank) lives->watch(r, std::size_t(r));
    }
    return first_shared_group("world", rank, members, patience, GroupMemory::Block(group, group->data()), lives,
                              segment_memory());
  }
};

void all_reduce(Communicator& group, std::int64_t n) {
  std::vector<float> x(std::size_t(n), 1.0f);
  group.all_reduce({x.data(), 1, n, DType::f32});
  check(x[0] == float(group.size()), "sum");
}

}  // namespace

TEST_CASE("a group ends when one of its processes dies") {
  const Cradle cradle(3);
  const auto call = GENERATE(0, 1, 2, 3);
  const auto run = [&](Communicator& world) {
    for (int i = 0; i < 20; ++i) {
      all_reduce(world, 100'000);
      if (world.rank() == 1 && i == 10) raise(SIGKILL);
      if (call == 1) world.broadcast("word", 1);
      if (call == 2) world.barrier();
      if (call == 3) {
        std::vector<float> x(100'000);
        const View view{x.data(), 1, 100'000, DType::f32};
        if (world.rank() == 1) world.send(view, 0);
        if (world.rank() == 0) world.recv(view, 1);
      }
    }
  };
  Patience patience;  // rank 2 may be left waiting for rank 0, which has ended its part but lives
  patience.peer_timeout = 1500ms;
  std::vector<Child> children;
  for (const int rank : {1, 2})
    children.emplace_back([&, rank] {
      const auto world = cradle.join(rank, patience);
      try {
        run(*world);
      } catch (const Error& error) {
        _exit(int(error.code()));
      }
    });
  const auto start = Clock::now();
  const auto world = cradle.join(0, {});
  try {
    run(*world);
    FAIL("no error came");
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::peer_lost);
    // rank 2 may have noticed first and ended, too
    CHECK_THAT(error.what(), Contains("is gone: its process ended; rank 0 on node-a"));
  }
  CHECK(WTERMSIG(children[0].wait()) == SIGKILL);
  CHECK(WEXITSTATUS(children[1].wait()) == int(ExitCode::peer_lost));
  CHECK(Clock::now() - start < 5s);
}

TEST_CASE("a group ends when one of its processes stops") {
  const Cradle cradle(2);
  Patience patience;
  patience.peer_dead_after = 500ms;
  const Child other([&] {
    const auto world = cradle.join(1, patience);
    all_reduce(*world, 1000);
    raise(SIGSTOP);
    all_reduce(*world, 1000);
  });
  const auto world = cradle.join(0, patience);
  all_reduce(*world, 1000);
  const auto start = Clock::now();
  try {
    all_reduce(*world, 1000);
    FAIL("no error came");
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::peer_lost);
    CHECK_THAT(error.what(), Contains("rank 1 on node-a") && Contains("has shown no sign of life for 0.5") &&
                                 Contains("rank 0 on node-a") && Contains("s for it in all_reduce of world"));
  }
  CHECK(Clock::now() - start < 5s);
}

TEST_CASE("what ends the run is said by one process, and the others know") {
  const Cradle cradle(2);
  NodeLives lives(std::shared_ptr<std::byte>(cradle.signs, cradle.signs->data()), 2, 0);
  CHECK_FALSE(lives.has_said_why());
  Child other([&] { NodeLives(std::shared_ptr<std::byte>(cradle.signs, cradle.signs->data()), 2, 1).say_why(); });
  other.wait();
  CHECK(lives.has_said_why());
}

TEST_CASE("a process that was stopped itself does not blame the others") {
  const Cradle cradle(2);
  Patience patience;
  patience.peer_dead_after = 400ms;
  patience.peer_timeout = 1500ms;
  Child other([&] {
    const auto world = cradle.join(1, patience);
    all_reduce(*world, 1000);  // waits here, is stopped for longer than its patience, and goes on waiting
    all_reduce(*world, 1000);
  });
  const auto world = cradle.join(0, Patience{});
  const pid_t pid = pid_t(cradle.sign(1).pid);
  std::this_thread::sleep_for(50ms);
  kill(pid, SIGSTOP);
  std::this_thread::sleep_for(2s);
  kill(pid, SIGCONT);
  std::this_thread::sleep_for(100ms);
  all_reduce(*world, 1000);
  all_reduce(*world, 1000);
  CHECK(other.wait() == 0);
}

TEST_CASE("a rank of another node is judged by what is heard of it", "[threads]") {
  const Cradle cradle(2);
  NodeLives lives(std::shared_ptr<std::byte>(cradle.signs, cradle.signs->data()), 2, 0);
  lives.watch_far(5, /*node=*/1, 1, /*listener=*/0);
  const auto trouble_within = [&](std::chrono::milliseconds time, bool beats) {
    std::string trouble;
    for (const auto end = Clock::now() + time; trouble.empty() && Clock::now() < end;
         std::this_thread::sleep_for(20ms)) {
      if (beats) ++cradle.sign(1).beats;
      trouble = lives.trouble(5, 300ms);
    }
    return trouble;
  };
  CHECK(trouble_within(600ms, false).empty());  // never heard: nothing is known
  CHECK(trouble_within(600ms, true).empty());
  CHECK_THAT(trouble_within(5s, false), Contains("has shown no sign of life for 0.3") && Contains("out of reach"));
}

TEST_CASE("where the rank that listens stops, other nodes are not blamed") {
  const Cradle cradle(3);
  Child listener([&] {
    const NodeLives lives(std::shared_ptr<std::byte>(cradle.signs, cradle.signs->data()), 3, 1);
    for (int i = 0; i < 50; ++i, std::this_thread::sleep_for(10ms)) ++cradle.sign(2).beats;
    raise(SIGSTOP);
  });
  NodeLives lives(std::shared_ptr<std::byte>(cradle.signs, cradle.signs->data()), 3, 0);
  while (cradle.sign(1).pid == 0) std::this_thread::sleep_for(1ms);
  lives.watch(1, 1);
  lives.watch_far(5, /*node=*/1, 2, /*listener=*/1);
  std::string trouble;
  for (const auto end = Clock::now() + 10s; trouble.empty() && Clock::now() < end; std::this_thread::sleep_for(20ms))
    trouble = lives.trouble(5, 1500ms);
  CHECK_THAT(trouble,
             Contains("is no longer heard of: rank 1, which listens for this node, has shown no sign of life"));
}

TEST_CASE("a node that falls silent is noticed though nobody waits, one rank of it that stops is not its end",
          "[threads]") {
  const Cradle cradle(4);
  NodeLives lives(std::shared_ptr<std::byte>(cradle.signs, cradle.signs->data()), 4, 0);
  lives.watch_far(7, /*node=*/1, 1, /*listener=*/0);
  lives.watch_far(8, /*node=*/1, 2, /*listener=*/0);
  lives.watch_far(9, /*node=*/2, 3, /*listener=*/0);  // never heard
  std::atomic<int> lost = 0;
  std::string trouble;
  lives.watch_nodes(600ms, [&](int rank, const std::string& what) {
    trouble = what;
    lost = rank;
  });
  const auto beat_for = [&](std::chrono::milliseconds time, std::vector<int> ranks) {
    for (const auto end = Clock::now() + time; lost == 0 && Clock::now() < end; std::this_thread::sleep_for(20ms))
      for (const int rank : ranks) ++cradle.sign(rank).beats;
  };
  beat_for(300ms, {1, 2});
  beat_for(1500ms, {2});
  CHECK(lost == 0);
  CHECK_FALSE(lives.has_lost_far());
  beat_for(10s, {});
  CHECK(lost == 7);
  CHECK(lives.has_lost_far());
  CHECK_THAT(trouble, Contains("has shown no sign of life for 0.") && Contains("its node is lost or out of reach"));
}
