// The ring between teacher and student: under threads (which ThreadSanitizer watches), between real processes, and when
// either side dies, stops or leaves.
#include "parallel/shm_channel.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <chrono>
#include <filesystem>
#include <functional>
#include <thread>

#include "parallel/shared_segment.h"
#include "test/support/channel_script.h"
#include "test/support/child.h"
#include "test/support/limit.h"
#include "test/support/refusal.h"

using namespace distill;
using namespace distill::test;
using namespace std::chrono_literals;
using Catch::Contains;

namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

Member member(int rank) { return {rank, 0, "node-a", getpid()}; }

// Both ends in one process, in heap memory: what ThreadSanitizer can follow.
struct Pair {
  GroupMemory::Block memory;
  explicit Pair(const ChannelShape& s = shape) {
    const auto heap = heap_memory();
    std::string ticket;
    memory = heap->make(channel_bytes(s), "", ticket);
    start_channel(memory.get(), s);
  }
  ChannelEnd student(const Patience& patience = {}, const ChannelShape& s = shape) const {
    return {memory, s, member(0), member(1), patience};
  }
  ChannelEnd teacher(const Patience& patience = {}, const ChannelShape& s = shape) const {
    return {memory, s, member(1), member(0), patience};
  }
};

// One end goes to a process of its own, which dies as it likes; the other stays here.
struct Processes {
  std::shared_ptr<SharedSegment> segment =
      std::make_shared<SharedSegment>(SharedSegment::create(channel_bytes(shape), "test"));
  GroupMemory::Block memory{segment, segment->data()};
  Processes() {
    start_channel(segment->data(), shape);
    segment->unlink();
  }
  ChannelEnd student(const Patience& patience = {}) const { return {memory, shape, member(0), member(1), patience}; }
  ChannelEnd teacher(const Patience& patience = {}) const { return {memory, shape, member(1), member(0), patience}; }
};

}  // namespace

TEST_CASE("chunks arrive as they were sent, in order, with back-pressure", "[threads]") {
  const int slow = GENERATE(0, 1, 2);  // nobody, the teacher, the student
  const Pair pair;
  const auto source = make_shared_source(pair.student());
  const auto sink = make_shared_sink(pair.teacher());
  const auto delay = [&](int side) -> std::function<void()> {
    return [state = std::uint64_t(side + 77), is_slow = slow == side]() mutable {
      if (is_slow) some_delay(state);
    };
  };
  bool all_taken = false;
  std::thread teacher([&] { all_taken = teach(*sink, 60, delay(1)); });
  const std::int64_t positions = learn(*source, 60, delay(2));
  teacher.join();
  CHECK(all_taken);
  CHECK(positions > 600);
  // a position costs its logits, once, and nothing else
  CHECK(source->bytes_moved() == positions * shape.columns * 2);
  if (slow == 1) CHECK(source->seconds_waited() > 0);
  if (slow == 2) CHECK(sink->seconds_waited() > 0);
}

TEST_CASE("the teacher runs ahead by the slots of the ring and no further") {
  const Pair pair;
  auto source = make_shared_source(pair.student());
  Patience patience;
  patience.peer_timeout = 100ms;
  const auto sink = make_shared_sink(pair.teacher(patience));
  const MicroBatch data = batch(4);  // 28 positions: chunks of 8, 8, 8, 4
  sink->begin(data);
  for (int c = 0; c < shape.slots; ++c) {
    REQUIRE(sink->acquire(8).data != nullptr);
    sink->publish();
  }
  CHECK(sink->seconds_waited() == 0);
  const Error error = error_of([&] { sink->acquire(4); });
  CHECK(error.code() == ExitCode::peer_lost);
  CHECK_THAT(error.what(),
             Contains("rank 1 on node-a") && Contains("s for rank 0 on node-a") &&
                 Contains("in the logits channel (a free slot for chunk 3 of micro-batch 1): it lives but "
                          "gives nothing (peer_timeout)"));
}

TEST_CASE("a student that leaves early ends the teacher's wait, without an error", "[threads]") {
  const Pair pair;
  auto source = make_shared_source(pair.student());
  const auto sink = make_shared_sink(pair.teacher());
  bool all_taken = true;
  std::thread teacher([&] { all_taken = teach(*sink, 1000); });
  learn(*source, 5);
  source.reset();
  teacher.join();
  CHECK_FALSE(all_taken);
  sink->begin(batch(1));
  CHECK(sink->acquire(1).data == nullptr);  // and stays so
}

TEST_CASE("what a teacher gave before it left is still read; more is an error") {
  const Pair pair;
  const auto source = make_shared_source(pair.student());
  auto sink = make_shared_sink(pair.teacher());
  CHECK(teach(*sink, 2));
  sink.reset();
  CHECK(learn(*source, 2) == 7);
  source->begin(batch(2));
  const Error error = error_of([&] { source->acquire(8); });
  CHECK(error.code() == ExitCode::peer_lost);
  CHECK_THAT(error.what(), Contains("rank 1 on node-a") && Contains("has closed its end; rank 0 on node-a") &&
                               Contains("still needs the logits channel (chunk 0 of micro-batch 3)"));
}

TEST_CASE("two sides out of step are told so") {
  const Pair pair;
  const auto source = make_shared_source(pair.student());
  const auto sink = make_shared_sink(pair.teacher());
  sink->begin(batch(1));
  sink->acquire(7);
  sink->publish();
  SECTION("another cut") {
    source->begin(batch(1));
    CHECK_THAT(error_of([&] { source->acquire(6); }).what(),
               Contains("sent chunk 0 of micro-batch 1 with 7 positions") &&
                   Contains("is at chunk 0 of micro-batch 1 with 6"));
  }
  SECTION("another micro-batch") {
    source->begin(batch(0));
    source->begin(batch(1));
    CHECK_THAT(error_of([&] { source->acquire(7); }).what(),
               Contains("sent chunk 0 of micro-batch 1") && Contains("is at chunk 0 of micro-batch 2"));
  }
  SECTION("other data") {
    MicroBatch other = batch(1);
    other.labels[3]++;
    source->begin(other);
    CHECK_THAT(error_of([&] { source->acquire(7); }).what(), Contains("supervise different tokens in micro-batch 1"));
  }
  SECTION("a second student at the same ring") {
    const auto second = make_shared_source(pair.student());
    source->begin(batch(1));
    source->acquire(7);
    source->release();
    for (int c = 1; c < 4; ++c) {  // the fourth chunk takes the slot of the first
      sink->begin(batch(1));
      sink->acquire(7);
      sink->publish();
    }
    second->begin(batch(1));
    CHECK_THAT(error_of([&] { second->acquire(7); }).what(), Contains("a slot holds chunk number 3 where 0 is due"));
  }
}

TEST_CASE("wrong use is refused") {
  const Pair pair;
  const auto source = make_shared_source(pair.student());
  const auto sink = make_shared_sink(pair.teacher());
  CHECK_THROWS_WITH(sink->acquire(1), Contains("before any micro-batch"));
  sink->begin(batch(1));
  CHECK_THROWS_WITH(sink->acquire(9), Contains("a chunk of 9 of at most 8 positions"));
  CHECK_THROWS_WITH(sink->acquire(0), Contains("a chunk of 0"));
  sink->acquire(3);
  CHECK_THROWS_WITH(sink->acquire(3), Contains("while another is held"));
  CHECK_THROWS_WITH(sink->begin(batch(2)), Contains("while a chunk is held"));
  CHECK_THROWS_WITH(source->release(), Contains("not held"));
  ChannelShape other = shape;
  other.columns = 51;
  CHECK_THROWS_WITH(make_shared_source(pair.student({}, other)),
                    Contains("3 slots of 8 positions x 50 bf16 on one side and 3 slots of 8 positions x 51 bf16"));
}

TEST_CASE("between processes chunks arrive as they were sent", "[processes]") {
  const int slow = GENERATE(0, 1, 2);
  const Processes memory;
  Child teacher([&] {
    std::uint64_t state = 5;
    const auto sink = make_shared_sink(memory.teacher());
    if (!teach(*sink, 200, [&] {
          if (slow == 1) some_delay(state);
        }))
      _exit(2);
  });
  std::uint64_t state = 9;
  const auto source = make_shared_source(memory.student());
  const std::int64_t positions = learn(*source, 200, [&] {
    if (slow == 2) some_delay(state);
  });
  CHECK(source->bytes_moved() == positions * shape.columns * 2);
  CHECK(teacher.wait() == 0);
}

TEST_CASE("a killed teacher is noticed at once", "[processes]") {
  const Processes memory;
  const Child teacher([&] {
    const auto sink = make_shared_sink(memory.teacher());
    teach(*sink, 3);
    raise(SIGKILL);
  });
  const auto source = make_shared_source(memory.student());
  learn(*source, 3);
  const auto start = Clock::now();
  source->begin(batch(3));
  const Error error = error_of([&] { source->acquire(8); });
  CHECK(error.code() == ExitCode::peer_lost);
  CHECK_THAT(error.what(), Contains("rank 1 on node-a") && Contains("is gone: its process ended; rank 0 on node-a") &&
                               Contains("s for it in the logits channel (chunk 0 of micro-batch 4)"));
  CHECK(seconds_since(start) < 2);
}

TEST_CASE("a killed student is noticed at once", "[processes]") {
  const Processes memory;
  const Child student([&] {
    const auto source = make_shared_source(memory.student());
    learn(*source, 3);
    raise(SIGKILL);
  });
  const auto sink = make_shared_sink(memory.teacher());
  const auto start = Clock::now();
  const Error error = error_of([&] { teach(*sink, 1000); });
  CHECK(error.code() == ExitCode::peer_lost);
  CHECK_THAT(error.what(), Contains("rank 0 on node-a") && Contains("is gone: its process ended; rank 1 on node-a") &&
                               Contains("a free slot for chunk"));
  CHECK(seconds_since(start) < 2);
}

TEST_CASE("a stopped partner is noticed by its silence, a stall is reported once", "[processes]") {
  const Processes memory;
  const Child teacher([&] {
    const auto sink = make_shared_sink(memory.teacher());
    teach(*sink, 2);
    raise(SIGSTOP);
  });
  Patience patience;
  patience.peer_dead_after = 1000ms;
  patience.stall_report = 100ms;
  std::vector<std::string> reports;
  patience.report = [&](const std::string& report) { reports.push_back(report); };
  const auto source = make_shared_source(memory.student(patience));
  learn(*source, 2);
  const auto start = Clock::now();
  source->begin(batch(2));
  const Error error = error_of([&] { source->acquire(8); });
  CHECK(error.code() == ExitCode::peer_lost);
  CHECK_THAT(error.what(), Contains("rank 1 on node-a") && Contains("has shown no sign of life for 1") &&
                               Contains("peer_dead_after") && Contains("rank 0 on node-a"));
  CHECK(seconds_since(start) > 0.9);
  CHECK(seconds_since(start) < 5);
  REQUIRE(reports.size() == 1);
  CHECK_THAT(reports[0],
             Contains("rank 0 on node-a") && Contains("for rank 1 on node-a") && Contains("goes on waiting"));
}

TEST_CASE("a partner that is slow but alive is waited for", "[processes]") {
  const Processes memory;
  const Child teacher([&] {
    const auto sink = make_shared_sink(memory.teacher());
    std::this_thread::sleep_for(800ms);
    teach(*sink, 2);
  });
  Patience patience;
  patience.peer_dead_after = 400ms;  // it beats, so this does not matter
  const auto source = make_shared_source(memory.student(patience));
  CHECK(learn(*source, 2) == 7);
  CHECK(source->seconds_waited() > 0.3);
}

TEST_CASE("partners of a group open their channel, and its memory has no name left", "[threads]") {
  const auto has_name = [] {  // of a segment of this process
    for (const auto& entry : std::filesystem::directory_iterator("/dev/shm"))
      if (entry.path().filename().string().starts_with(text("distill-", getpid(), "-"))) return true;
    return false;
  };
  run_ranks(2, [&](Communicator& world) {
    if (world.rank() == 0) {
      const auto source = open_shared_source(world, 1, shape);
      world.barrier();
      check(!has_name(), "a name is left in /dev/shm");
      check(learn(*source, 40) > 100, "too little");
    } else {
      const auto sink = open_shared_sink(world, 0, shape);
      world.barrier();
      check(teach(*sink, 40), "the student left");
    }
  });
}

TEST_CASE("names that killed processes left are removed, those of living ones are not") {
  const auto exists = [](const std::string& name) { return std::filesystem::exists("/dev/shm" + name); };
  std::string left;
  {
    int ends[2];
    REQUIRE(pipe(ends) == 0);
    Child killed([&] {
      const SharedSegment segment = SharedSegment::create(100, "the ring");
      if (write(ends[1], segment.name().data(), segment.name().size()) > 0) pause();
    });
    left.resize(100);
    left.resize(std::size_t(std::max<ssize_t>(read(ends[0], left.data(), left.size()), 0)));
    close(ends[0]);
    close(ends[1]);
    SharedSegment::remove_leftovers();
    CHECK(exists(left));  // its maker lives
  }
  REQUIRE(exists(left));
  SharedSegment mine = SharedSegment::create(100, "the ring");
  const SharedSegment moved = std::move(mine);
  SharedSegment::remove_leftovers();
  CHECK_FALSE(exists(left));
  CHECK(exists(moved.name()));
  CHECK(SharedSegment::open(moved.name(), 100).size() == 100);
}

TEST_CASE("what is being made is not taken for a leftover") {
  Child sweeper([] {
    for (;;) SharedSegment::remove_leftovers();
  });
  for (int i = 0; i < 2000; ++i) {
    const SharedSegment segment = SharedSegment::create(100, "the ring");
    CHECK(SharedSegment::open(segment.name(), 100).size() == 100);
  }
}

TEST_CASE("shared memory that the machine does not give is an input error that says what for") {
  std::string message;
  try {
    const test::Limit no_more_files(RLIMIT_NOFILE, 0);  // not while the outcome is checked: sanitizers need files
    SharedSegment::create(1, "the ring");
  } catch (const Error& error) {
    message = error.what();
  }
  CHECK(message == "the ring: cannot make shared memory in /dev/shm: Too many open files");
}

TEST_CASE("too little shared memory is one clear error on both sides") {
  ChannelShape huge = shape;
  huge.positions = std::int64_t(1) << 40;
  int errors = 0;
  run_ranks(2, [&](Communicator& world) {
    try {
      world.run_together([&] {
        if (world.rank() == 0)
          open_shared_source(world, 1, huge);
        else
          open_shared_sink(world, 0, huge);
      });
    } catch (const CommonError& error) {
      check(error.code() == ExitCode::bad_input, "code ", int(error.code()));
      const std::string message = error.what();
      const auto has = [&](const char* part) { return message.find(part) != std::string::npos; };
      check(has("the logits channel (3 slots of 1099511627776 positions x 50 bf16; logits_chunk, logits_ring_slots) "
                "needs "
                "3298534") &&
                has(" bytes of shared memory, /dev/shm has ") && has(" available (df /dev/shm)"),
            message);
      if (world.rank() == 0) ++errors;
    }
  });
  CHECK(errors == 1);
}
