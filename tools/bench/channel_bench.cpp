// What communication costs on one node: mpirun -np 2 --bind-to none channel_bench
// The logits channel against a plain copy, through shared memory and by messages, its hand-over of a slot, an
// all-reduce through both, and what starting an operation costs.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "core/train/micro_batch.h"
#include "parallel/parallel.h"

namespace distill {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double best_seconds(int repeats, const std::function<void()>& body) {
  double best = 1e9;
  for (int i = 0; i <= repeats; ++i) {
    const auto start = Clock::now();
    body();
    if (i > 0) best = std::min(best, seconds_since(start));
  }
  return best;
}

// Sum of the words of a slot: reads every byte once, as the loss does.
std::uint64_t sum_of(const ConstView& x) {
  const std::uint64_t* words = static_cast<const std::uint64_t*>(x.data);
  std::uint64_t sum = 0;
  for (std::int64_t i = 0; i < x.size() * std::int64_t(size_of(x.dtype)) / 8; ++i) sum += words[i];
  return sum;
}

// How the two ends of a channel are opened.
struct Way {
  Communicator& pair;
  std::unique_ptr<TeacherSource> (*source)(Communicator&, int, const ChannelShape&);
  std::unique_ptr<LogitsSink> (*sink)(Communicator&, int, const ChannelShape&);
};

// Seconds of a teacher that copies logits into every slot and a student that reads them in place.
double channel_seconds(const Way& way, const ChannelShape& shape, int chunks, bool touches) {
  Communicator& world = way.pair;
  const std::vector<std::uint16_t> logits(std::size_t(shape.positions * shape.columns), 1);
  MicroBatch batch;
  std::uint64_t sum = 0;
  double seconds = 0;
  const auto run = [&](const std::function<void()>& one) {
    for (int c = 0; c < 2 * shape.slots; ++c) one();  // every page has been touched
    world.barrier();
    const auto start = Clock::now();
    for (int c = 0; c < chunks; ++c) one();
    seconds = seconds_since(start);
    world.barrier();
  };
  if (world.rank() == 0) {
    const auto source = way.source(world, 1, shape);
    source->begin(batch);
    run([&] {
      const ConstView got = source->acquire(shape.positions);
      if (touches) sum += sum_of(got);
      source->release();
    });
    if (touches && sum == 0) fail("nothing was read");
  } else {
    const auto sink = way.sink(world, 0, shape);
    sink->begin(batch);
    run([&] {
      const View slot = sink->acquire(shape.positions);
      check(slot.data != nullptr, "the student left");
      if (touches) std::memcpy(slot.mutable_data(), logits.data(), logits.size() * 2);
      sink->publish();
    });
  }
  return world.all_reduce(seconds, Reduce::max);
}

void run(MpiSession& session) {
  Communicator& world = session.world();
  check_input(world.size() == 2, "start two ranks: mpirun -np 2 --bind-to none channel_bench");
  const bool prints = world.rank() == 0;

  const ChannelShape shape{128, 151936, DType::bf16, 4};
  const double bytes = double(shape.positions * shape.columns * 2);
  const std::vector<char> from(std::size_t(bytes), 1);
  std::vector<char> to = from;
  const double copy =
      world.all_reduce(best_seconds(5, [&] { std::memcpy(to.data(), from.data(), to.size()); }), Reduce::max);
  const auto messages = session.messages("messages");
  const std::pair<const char*, Way> ways[] = {
      {"shared memory", {world, open_shared_source, open_shared_sink}},
      {"messages", {*messages, open_message_source, open_message_sink}},
      {"mailboxes", {world, open_message_source, open_message_sink}},
  };
  if (prints) std::printf("copy of a slot of %.0f MB %.2f GB/s\n", bytes / 1e6, bytes / copy / 1e9);
  for (const auto& [name, way] : ways) {
    const int chunks = 40;
    const double channel = channel_seconds(way, shape, chunks, true) / chunks;
    if (prints) std::printf("channel by %-13s (copied in, read in place) %.2f GB/s\n", name, bytes / channel / 1e9);
    for (const int slots : {1, 4}) {
      const int small_chunks = 5'000;
      const double hand_over = channel_seconds(way, {1, 32, DType::bf16, slots}, small_chunks, false) / small_chunks;
      if (prints) std::printf("  hand-over of a slot, %d in the ring: %.2f us\n", slots, 1e6 * hand_over);
    }
  }

  for (const std::int64_t n : {1 << 10, 1 << 20, 1 << 24}) {
    std::vector<float> x(std::size_t(n), 1e-6f);
    for (Communicator* group : {&world, messages.get()}) {
      const double seconds = best_seconds(10, [&] { group->all_reduce({x.data(), 1, n, DType::f32}); });
      if (prints)
        std::printf("all_reduce of %8.3f MB by %-13s %9.1f us, %.2f GB/s\n", double(n) * 4e-6,
                    group == &world ? "shared memory" : "messages", 1e6 * seconds, double(n) * 4 / seconds / 1e9);
    }
  }
  for (Communicator* group : {&world, messages.get()}) {
    float x = 1;
    const View one(&x, 1, 1, DType::f32);
    const int calls = 1000;
    const double blocking = best_seconds(5, [&] {
      for (int i = 0; i < calls; ++i) group->all_reduce(one);
    });
    const double started = best_seconds(5, [&] {
      for (int i = 0; i < calls; ++i) group->start_all_reduce(one)->wait();
    });
    const double in_a_row = best_seconds(5, [&] {
      std::vector<std::unique_ptr<Pending>> pending;
      for (int i = 0; i < calls; ++i) pending.push_back(group->start_all_reduce(one));
      for (const auto& p : pending) p->wait();
    });
    if (prints)
      std::printf(
          "all_reduce of one value by %-13s %.1f us; started and waited for %.1f us; %d started at once %.1f us\n",
          group == &world ? "shared memory" : "messages", 1e6 * blocking / calls, 1e6 * started / calls, calls,
          1e6 * in_a_row / calls);
  }
  const double barrier = best_seconds(20, [&] {
    for (int i = 0; i < 100; ++i) world.barrier();
  });
  if (prints) std::printf("barrier %.2f us\n", 1e4 * barrier);
}

}  // namespace
}  // namespace distill

int main(int argc, char** argv) {
  distill::MpiSession session(argc, argv);
  try {
    distill::run(session);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    session.abort_all(1);
  }
}
