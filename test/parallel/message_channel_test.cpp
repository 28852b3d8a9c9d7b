// The logits channel by messages: between threads (which ThreadSanitizer watches), between processes of a node, and
// over MPI. Rank 0 is the student, rank 1 the teacher.
#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <thread>
#include <utility>

#include "test/support/channel_script.h"
#include "test/support/mpi_main.h"
#include "test/support/refusal.h"

using namespace distill;
using namespace distill::test;

namespace {

// Ranks that are threads cannot use Catch's macros: the suite throws, and the test case sees it.
void check_says(const Error& error, ExitCode code, const std::vector<std::string>& parts) {
  check(error.code() == code, "code ", int(error.code()), ": ", error.what());
  for (const std::string& part : parts)
    check(std::string(error.what()).find(part) != std::string::npos, "no \"", part, "\" in: ", error.what());
}

// The two roles of a scenario, each on its rank; both have left when it returns.
void play(Communicator& pair, const std::function<void(Communicator&)>& student,
          const std::function<void(Communicator&)>& teacher) {
  (pair.rank() == 0 ? student : teacher)(pair);
  pair.barrier();
}

// Opens an end that waits only so long.
template <class Open>
auto impatient(Communicator& pair, const Open& open, std::function<void(const std::string&)> report = {}) {
  const Patience before = pair.patience();
  Patience short_of_it = before;
  short_of_it.peer_timeout = std::chrono::seconds(1);
  short_of_it.report = std::move(report);
  pair.set_patience(short_of_it);
  auto end = open();
  pair.set_patience(before);
  return end;
}

void chunks_arrive(Communicator& pair, int slow) {
  std::uint64_t state = 77;
  const auto delay = [&](int side) -> std::function<void()> {
    return [&state, is_slow = slow == side] {
      if (is_slow) some_delay(state);
    };
  };
  play(
      pair,
      [&](Communicator&) {
        const auto source = open_message_source(pair, 1, shape);
        const std::int64_t positions = learn(*source, 60, delay(2));
        check(positions > 600, "only ", positions, " positions");
        check(source->bytes_moved() == positions * shape.columns * 2, source->bytes_moved(), " bytes");
        if (slow == 1) check(source->seconds_waited() > 0, "the student did not wait");
      },
      [&](Communicator&) {
        const auto sink = open_message_sink(pair, 0, shape);
        check(teach(*sink, 60, delay(1)), "the student left");
        if (slow == 2) check(sink->seconds_waited() > 0, "the teacher did not wait");
      });
}

void teacher_is_ahead_by_the_ring(Communicator& pair) {
  const MicroBatch data = batch(4);  // 28 positions: chunks of 8, 8, 8, 4
  play(
      pair,
      [&](Communicator&) {
        const auto source = open_message_source(pair, 1, shape);
        pair.barrier();
        source->begin(data);
        for (int c = 0; c < shape.slots; ++c) {
          source->acquire(8);
          source->release();
        }
        check_says(error_of([&] { source->acquire(4); }), ExitCode::peer_lost,
                   {"has closed its end; rank ", "still needs the logits channel (chunk 3 of micro-batch 1)"});
      },
      [&](Communicator&) {
        auto sink = impatient(pair, [&] { return open_message_sink(pair, 0, shape); });
        sink->begin(data);
        for (int c = 0; c < shape.slots; ++c) {
          check(sink->acquire(8).data != nullptr, "no slot");
          sink->publish();
        }
        check(sink->seconds_waited() == 0, "the teacher waited for a slot of an empty ring");
        check_says(error_of([&] { sink->acquire(4); }), ExitCode::peer_lost,
                   {"(a free slot for chunk 3 of micro-batch 1): it lives but gives nothing (peer_timeout)"});
        sink.reset();
        pair.barrier();
      });
}

void student_leaves(Communicator& pair) {
  play(
      pair,
      [&](Communicator&) {
        const auto source = open_message_source(pair, 1, shape);
        learn(*source, 5);
      },
      [&](Communicator&) {
        const auto sink = open_message_sink(pair, 0, shape);
        check(!teach(*sink, 1000), "the student took everything");
        sink->begin(batch(1));
        check(sink->acquire(1).data == nullptr, "a slot after the end");  // and stays so
      });
}

void teacher_leaves(Communicator& pair) {
  play(
      pair,
      [&](Communicator&) {
        const auto source = open_message_source(pair, 1, shape);
        pair.barrier();
        check(learn(*source, 2) == 7, "not what the teacher gave");
        source->begin(batch(2));
        check_says(error_of([&] { source->acquire(8); }), ExitCode::peer_lost,
                   {"has closed its end", "still needs the logits channel (chunk 0 of micro-batch 3)"});
      },
      [&](Communicator&) {
        auto sink = open_message_sink(pair, 0, shape);
        check(teach(*sink, 2), "the student left");
        sink.reset();  // does not wait for the student to read
        pair.barrier();
      });
}

void nobody_begins(Communicator& pair) {
  for (int i = 0; i < 10; ++i)
    play(
        pair, [&](Communicator&) { open_message_source(pair, 1, shape); },
        [&](Communicator&) { open_message_sink(pair, 0, shape); });
}

void silent_teacher(Communicator& pair) {
  play(
      pair,
      [&](Communicator&) {
        std::atomic<int> reports = 0;
        auto source = impatient(
            pair, [&] { return open_message_source(pair, 1, shape); }, [&](const std::string&) { ++reports; });
        // Nobody asks for anything yet: that nothing comes is no stall.
        std::this_thread::sleep_for(std::chrono::milliseconds(1200));
        check(reports == 0, "a stall is reported that is none");
        source->begin(batch(1));
        check_says(error_of([&] { source->acquire(7); }), ExitCode::peer_lost,
                   {"in the logits channel (chunk 0 of micro-batch 1): it lives but gives nothing (peer_timeout)"});
        source.reset();
        pair.barrier();
      },
      [&](Communicator&) {
        const auto sink = open_message_sink(pair, 0, shape);
        pair.barrier();
      });
}

// What the student says when it reads `mine`, `positions` of it, where the teacher sends batch(1).
Error disagreement(Communicator& pair, const std::vector<MicroBatch>& mine, std::int64_t positions) {
  Error error(ExitCode::ok, "");
  play(
      pair,
      [&](Communicator&) {
        error = error_of([&] {
          const auto source = open_message_source(pair, 1, shape);
          for (const MicroBatch& data : mine) source->begin(data);
          source->acquire(positions);
        });
      },
      [&](Communicator&) {
        const auto sink = open_message_sink(pair, 0, shape);
        teach(*sink, 30);
      });
  return error;
}

void sides_out_of_step(Communicator& pair) {
  const auto says = [&](const Error& error, const std::vector<std::string>& parts) {
    if (pair.rank() == 0) check_says(error, ExitCode::internal, parts);
  };
  says(disagreement(pair, {batch(0), batch(1)}, 6),
       {"sent chunk 0 of micro-batch 2 with 7 positions", "is at chunk 0 of micro-batch 2 with 6"});
  says(disagreement(pair, {batch(1)}, 7), {"sent chunk 0 of micro-batch 2", "is at chunk 0 of micro-batch 1"});
  MicroBatch other = batch(1);
  other.labels[3]++;
  says(disagreement(pair, {batch(0), other}, 7), {"supervise different tokens in micro-batch 2"});
}

void shapes_differ(Communicator& pair) {
  ChannelShape mine = shape;
  mine.columns += pair.rank();
  const Error error = error_of([&] {
    if (pair.rank() == 0)
      open_message_source(pair, 1, mine);
    else
      open_message_sink(pair, 0, mine);
  });
  check_says(error, ExitCode::internal,
             {"3 slots of 8 positions x 50 bf16 on one side and 3 slots of 8 positions x 51 bf16"});
  pair.barrier();
}

void suite(Communicator& pair) {
  for (const int slow : {0, 1, 2}) chunks_arrive(pair, slow);  // nobody, the teacher, the student
  teacher_is_ahead_by_the_ring(pair);
  student_leaves(pair);
  teacher_leaves(pair);
  nobody_begins(pair);
  silent_teacher(pair);
  sides_out_of_step(pair);
  shapes_differ(pair);
}

}  // namespace

TEST_CASE("a channel by messages between threads") { run_ranks(2, suite); }

TEST_CASE("a channel by messages in the world of this process", "[mpi]") { suite(test_session().world()); }

TEST_CASE("a channel by messages between ranks that use messages", "[mpi]") {
  suite(*test_session().messages("by messages"));
}

TEST_CASE("a partner that fails ends the wait of the other") {
  const int culprit = GENERATE(0, 1);
  std::atomic<int> ended = 0;
  const auto start = std::chrono::steady_clock::now();
  std::string message;
  try {
    run_ranks(2, [&](Communicator& pair) {
      const struct Count {
        std::atomic<int>& n;
        ~Count() { ++n; }
      } count{ended};
      if (pair.rank() == 0) {
        const auto source = open_message_source(pair, 1, shape);
        if (culprit == 0) fail_input("bad data");
        learn(*source, 60);
      } else {
        const auto sink = open_message_sink(pair, 0, shape);
        if (culprit == 1) fail_input("bad data");
        teach(*sink, 60);
      }
    });
  } catch (const Error& error) {
    message = error.what();
  }
  CHECK(message.find(culprit == 0 ? "bad data" : "") != std::string::npos);
  CHECK(ended == 2);
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(20));
}
