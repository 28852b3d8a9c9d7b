// One suite for every kind of group: alone, threads, MPI ranks through shared memory, MPI ranks through messages.
#include "core/communicator.h"

#include <time.h>
#include <unistd.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>

#include "test/support/mpi_main.h"

using namespace distill;
using Catch::Contains;

namespace {

template <class T>
View view_of(std::vector<T>& x) {
  return {x.data(), 1, std::int64_t(x.size()), dtype_of<T>};
}

// Value i of a rank: of many magnitudes, so that no other order of additions rounds to the same sums by accident.
double value(int rank, std::int64_t i) {
  std::uint64_t x = (std::uint64_t(rank) << 40) + std::uint64_t(i) + 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return double(std::int64_t(x)) * 0x1p-63 * double(1 << (i % 7));
}

template <class T>
T number(double x) {
  if constexpr (std::is_integral_v<T>)
    return T(x * 1000);
  else if constexpr (std::is_same_v<T, double>)
    return x;
  else
    return T(float(x));
}
template <class T>
double widened(T x) {
  if constexpr (sizeof(T) == 2)
    return float(x);
  else
    return double(x);
}

template <class T>
std::vector<T> values(int rank, std::int64_t n, std::int64_t first = 0) {
  std::vector<T> x(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < n; ++i) x[std::size_t(i)] = number<T>(value(rank, first + i));
  return x;
}

// What the contract promises, element by element: rank order, f32 for 16 bits, rounded once.
template <class T>
T reduction(int ranks, std::int64_t i, Reduce op) {
  using A = std::conditional_t<std::is_integral_v<T>, std::int64_t, Compute<T>>;
  A sum = A(number<T>(value(0, i)));
  for (int r = 1; r < ranks; ++r) {
    const A x = A(number<T>(value(r, i)));
    sum = op == Reduce::sum ? sum + x : op == Reduce::max ? std::max(sum, x) : std::min(sum, x);
  }
  return T(sum);
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

int next_of(const Communicator& group) { return (group.rank() + 1) % group.size(); }
int before(const Communicator& group) { return (group.rank() + group.size() - 1) % group.size(); }

// Ranks that are threads cannot use Catch's macros: the suite throws, and the test case sees it.
template <class T>
void reductions(Communicator& group, std::int64_t n) {
  for (const Reduce op : {Reduce::sum, Reduce::max, Reduce::min}) {
    std::vector<T> expected(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) expected[std::size_t(i)] = reduction<T>(group.size(), i, op);
    std::vector<T> x = values<T>(group.rank(), n);
    group.all_reduce(view_of(x), op);
    check(same_bits(x, expected), "all_reduce of ", n, " ", name_of(dtype_of<T>), ", op ", int(op));

    const std::int64_t total = n * group.size();
    std::vector<T> all = values<T>(group.rank(), total), mine(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i)
      expected[std::size_t(i)] = reduction<T>(group.size(), group.rank() * n + i, op);
    group.reduce_scatter(view_of(mine), view_of(all), op);
    check(same_bits(mine, expected), "reduce_scatter of ", n, " ", name_of(dtype_of<T>), ", op ", int(op));
    // in place: the part of `all` that is this rank's
    group.reduce_scatter(view_of(all).col_slice(group.rank() * n, n), view_of(all), op);
    check(std::memcmp(all.data() + group.rank() * n, expected.data(), expected.size() * sizeof(T)) == 0,
          "reduce_scatter in place");
  }
}

template <class T>
void copies(Communicator& group, std::int64_t n) {
  std::vector<T> expected;
  for (int r = 0; r < group.size(); ++r) {
    const std::vector<T> part = values<T>(r, n);
    expected.insert(expected.end(), part.begin(), part.end());
  }
  std::vector<T> mine = values<T>(group.rank(), n), all(expected.size());
  group.all_gather(view_of(all), view_of(mine));
  check(same_bits(all, expected), "all_gather of ", n, " ", name_of(dtype_of<T>));
  std::vector<T> in_place(expected.size());
  std::copy(mine.begin(), mine.end(), in_place.begin() + group.rank() * n);
  group.all_gather(view_of(in_place), view_of(in_place).col_slice(group.rank() * n, n));
  check(same_bits(in_place, expected), "all_gather in place");

  for (int root = 0; root < group.size(); ++root) {
    std::vector<T> x = values<T>(group.rank() == root ? 100 : group.rank(), n);
    group.broadcast(view_of(x), root);
    check(same_bits(x, values<T>(100, n)), "broadcast of ", n, " ", name_of(dtype_of<T>), " from ", root);
  }

  // Around the ring; rank 0 receives last so that not everybody sends at once.
  if (group.size() == 1) return;
  std::vector<T> got(static_cast<std::size_t>(n));
  if (group.rank() == 0) group.send(view_of(mine), next_of(group));
  group.recv(view_of(got), before(group));
  if (group.rank() != 0) group.send(view_of(mine), next_of(group));
  check(same_bits(got, values<T>(before(group), n)), "send and recv of ", n, " ", name_of(dtype_of<T>));
}

void every_type(Communicator& group) {
  for (const std::int64_t n : {1, 2, 3, 63, 1000, 9001}) {
    reductions<float>(group, n);
    copies<float>(group, n);
  }
  for (const std::int64_t n : {5, 4097}) {
    reductions<bf16>(group, n);
    reductions<f16>(group, n);
    reductions<double>(group, n);
    reductions<std::int32_t>(group, n);
    copies<bf16>(group, n);
    copies<f16>(group, n);
    copies<double>(group, n);
    copies<std::int32_t>(group, n);
  }
  // longer than any internal piece
  reductions<float>(group, 150'003);
  copies<double>(group, 70'001);
  // nothing at all
  std::vector<float> nothing;
  group.all_reduce(view_of(nothing));
  group.all_gather(view_of(nothing), view_of(nothing));
  group.broadcast(view_of(nothing), 0);
}

void nan_survives(Communicator& group) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const Reduce op : {Reduce::sum, Reduce::max, Reduce::min})
    for (int r = 0; r < group.size(); ++r) {
      std::vector<float> x{group.rank() == r ? nan : 1.0f, 2.0f};
      group.all_reduce(view_of(x), op);
      check(std::isnan(x[0]), "NaN of rank ", r, " is lost");
      check(std::isnan(group.all_reduce(group.rank() == r ? double(nan) : 1.0, op)), "NaN of rank ", r,
            " is lost (host)");
    }
}

void small_things(Communicator& group) {
  const int n = group.size(), me = group.rank();
  check(group.all_reduce(std::int64_t{me + 1}) == std::int64_t{n} * (n + 1) / 2, "sum of integers");
  check(group.all_reduce(std::int64_t{1} << 40, Reduce::max) == std::int64_t{1} << 40, "max of integers");
  check(group.all_reduce(0.5 * me, Reduce::max) == 0.5 * (n - 1), "max of doubles");
  std::vector<double> pair{double(me), 1.0};
  group.all_reduce(std::span(pair), Reduce::sum);
  check(pair[0] == n * (n - 1) / 2.0 && pair[1] == n, "sum of two doubles");
  group.all_reduce(std::span<double>{});
  check(group.any(me == n - 1) && !group.any(false) && group.all(true) && group.all(me == 0) == (n == 1), "any, all");
  for (int root = 0; root < n; ++root) {
    const std::string word = text("from ", root, std::string(std::size_t(root) * 1000, 'x'));
    check(group.broadcast(me == root ? word : "ignored", root) == word, "broadcast of a string from ", root);
    check(group.broadcast("", root).empty(), "broadcast of nothing");
  }
  const std::vector<std::string> words = group.all_gather(std::string(std::size_t(me) * 3, char('a' + me)));
  for (int r = 0; r < n; ++r)
    check(words.at(std::size_t(r)) == std::string(std::size_t(r) * 3, char('a' + r)), "string of rank ", r);
  check(group.all_gather("") == std::vector<std::string>(std::size_t(n)), "empty strings");
  check(group.all_equal("same") && group.all_equal(text(me)) == (n == 1), "all_equal");
  group.barrier();
}

void errors_are_common(Communicator& group) {
  group.run_together([] {});
  try {
    group.run_together([&] {
      if (group.rank() == group.size() - 1) fail_input("file x: not found");
    });
    fail("no error came");
  } catch (const CommonError& error) {
    check(error.code() == ExitCode::bad_input && std::string(error.what()) == "file x: not found",
          "wrong error: ", error.what());
  }
  try {
    group.run_together([&] { throw std::runtime_error(text("rank ", group.rank())); });
    fail("no error came");
  } catch (const CommonError& error) {
    check(error.code() == ExitCode::internal && std::string(error.what()) == "rank 0", "wrong error: ", error.what());
  }
}

void splits(Communicator& group) {
  const int n = group.size(), me = group.rank();
  // reversed order
  const auto reversed = group.split(0, -me, "reversed");
  check(reversed->size() == n && reversed->rank() == n - 1 - me && reversed->name() == "reversed", "reversed group");
  check(reversed->members()[0].world_rank == group.members()[std::size_t(n - 1)].world_rank, "members follow");
  // even and odd; equal keys keep the order
  const auto half = group.split(me % 2, 0, text("half ", me % 2));
  const int expected = (n + 1 - me % 2) / 2;
  check(half->size() == expected && half->rank() == me / 2, "half");
  check(
      half->all_reduce(std::int64_t{1} << me) ==
          [&] {
            std::int64_t bits = 0;
            for (int r = me % 2; r < n; r += 2) bits |= std::int64_t{1} << r;
            return bits;
          }(),
      "sum within half");
  // rank 0 stays out
  const auto rest = group.split(me == 0 ? -1 : 5, me, "rest");
  check((rest == nullptr) == (me == 0), "rank 0 takes no part");
  if (rest) check(rest->all_reduce(std::int64_t{1}) == n - 1, "sum of the rest");
  // groups of groups, and all of them at once
  const auto again = half->split(half->rank(), 0, "each");
  check(again->size() == 1 && again->all_reduce(3.0) == 3.0, "a group of one");
  reductions<float>(*reversed, 5000);
  copies<float>(*reversed, 5000);
  reductions<bf16>(*half, 5000);
  copies<bf16>(*half, 5000);
  group.barrier();
}

void misuse(Communicator& group) {
  std::vector<float> x(6), y(6);
  const auto message = [](const std::function<void()>& call) {
    try {
      call();
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  const std::string name = group.name();
  check(message([&] {
          group.all_reduce({x.data(), 2, 2, 3, DType::f32});
        }) == name + ": all_reduce of f32[2,2] with stride 3",
        "all_reduce of a strided view");
  check(message([&] {
          group.all_gather(view_of(x).col_slice(0, 5), view_of(y).col_slice(0, 2));
        }).find("all_gather of f32[1,2] to f32[1,5]") != std::string::npos,
        "all_gather of wrong shapes");
  check(message([&] { group.broadcast(view_of(x), group.size()); }).find("broadcast from rank") != std::string::npos,
        "broadcast from nobody");
  check(!message([&] { group.send(view_of(x), group.rank()); }).empty(), "send to oneself");
  check(!message([&] { group.recv(view_of(x), -1); }).empty(), "recv from nobody");
}

template <class T>
void started_equals_blocking(Communicator& group, std::int64_t n) {
  const std::int64_t total = n * group.size();
  std::vector<T> sum = values<T>(group.rank(), n), all = values<T>(group.rank(), total), mine(std::size_t(n), T{}),
                 gathered(std::size_t(total), T{});
  std::vector<T> sum2 = sum, mine2 = mine, gathered2 = gathered;
  {
    const auto a = group.start_all_reduce(view_of(sum), Reduce::max);
    const auto b = group.start_reduce_scatter(view_of(mine), view_of(all));
    const auto c = group.start_all_gather(view_of(gathered), view_of(mine));  // runs after b, whose result it takes
    c->wait();
    b->wait();
    a->wait();
    a->wait();  // as often as one likes
  }
  group.all_reduce(view_of(sum2), Reduce::max);
  group.reduce_scatter(view_of(mine2), view_of(all));
  group.all_gather(view_of(gathered2), view_of(mine2));
  check(same_bits(sum, sum2) && same_bits(mine, mine2) && same_bits(gathered, gathered2), "started calls of ", n, " ",
        name_of(dtype_of<T>), " give other bits");
}

// Both ways around a ring, every message longer than any mailbox, next to a collective; all sends before any receive.
void ring_both_ways(Communicator& group) {
  if (group.size() == 1) return;
  const int next = next_of(group), last = before(group);
  constexpr std::int64_t n = 100'000;
  constexpr int rounds = 3;
  std::vector<std::vector<float>> up, down, from_last(rounds, std::vector<float>(n)), from_next = from_last;
  for (int i = 0; i < rounds; ++i) {
    up.push_back(values<float>(group.rank(), n, i));
    down.push_back(values<float>(group.rank(), n, 1000 + i));
  }
  std::vector<float> sum = values<float>(group.rank(), n);
  std::vector<std::unique_ptr<Pending>> pending;
  for (std::size_t i = 0; i < rounds; ++i) {
    pending.push_back(group.start_send(view_of(up[i]), next));
    pending.push_back(group.start_send(view_of(down[i]), last));
  }
  pending.push_back(group.start_all_reduce(view_of(sum)));
  for (std::size_t i = 0; i < rounds; ++i) {
    pending.push_back(group.start_recv(view_of(from_last[i]), last));
    pending.push_back(group.start_recv(view_of(from_next[i]), next));
  }
  for (const auto& p : pending) p->wait();
  for (int i = 0; i < rounds; ++i) {
    check(same_bits(from_last[std::size_t(i)], values<float>(last, n, i)), "from the rank before, round ", i);
    check(same_bits(from_next[std::size_t(i)], values<float>(next, n, 1000 + i)), "from the next rank, round ", i);
  }
  check(sum[n - 1] == reduction<float>(group.size(), n - 1, Reduce::sum), "sum next to messages");
}

// A blocking call comes after the started ones of its kind; what is dropped is done nevertheless.
void started_keeps_order(Communicator& group) {
  const std::int64_t n = 20'000;
  std::vector<float> x(std::size_t(n), 1.0f);
  { const auto dropped = group.start_all_reduce(view_of(x)); }
  check(x[5] == float(group.size()), "a dropped operation is not done");
  const auto started = group.start_all_reduce(view_of(x));
  group.all_reduce(view_of(x));
  check(group.all_reduce(std::int64_t{1}) == group.size(), "a small sum after started calls");
  check(x[n - 1] == std::pow(float(group.size()), 3.0f), "a blocking call ran before a started one");
  started->wait();
  if (group.size() == 1) return;
  std::vector<float> first(1000, 1.0f), second(1000, 2.0f), got(1000), got2(1000);
  const auto send = group.start_send(view_of(first), next_of(group));
  const auto receive = group.start_recv(view_of(got), before(group));
  const auto send2 = group.start_send(view_of(second), next_of(group));
  group.recv(view_of(got2), before(group));
  check(got[0] == 1 && got2[0] == 2, "messages of one lane changed places");
}

void started(Communicator& group) {
  for (const std::int64_t n : {1, 777, 40'001}) started_equals_blocking<float>(group, n);
  started_equals_blocking<bf16>(group, 5001);
  started_equals_blocking<double>(group, 5001);
  std::vector<float> nothing;
  group.start_all_reduce(view_of(nothing))->wait();
  group.start_all_gather(view_of(nothing), view_of(nothing))->wait();
  ring_both_ways(group);
  started_keeps_order(group);
}

// wait() throws what the operation threw, and so does everything after it in its lane; other lanes go on.
void started_errors_come_out(Communicator& group) {
  if (group.size() == 1) return;
  const auto broken = group.split(0, 0, "broken");
  std::vector<float> x(broken->rank() == 0 ? 5u : 4u), y(4, 1.0f);
  if (broken->rank() == 0) broken->start_send(view_of(x), 1)->wait();
  if (broken->rank() == 1) {
    const auto error = [](const auto& call) {
      try {
        call();
      } catch (const Error& e) {
        return std::string(e.what());
      }
      return std::string();
    };
    const auto bad = broken->start_recv(view_of(x), 0), later = broken->start_recv(view_of(y), 0);
    for (const std::string& message :
         {error([&] { bad->wait(); }), error([&] { later->wait(); }), error([&] { broken->recv(view_of(y), 0); })})
      check(message.find("broken: rank 1 receives 16 bytes") != std::string::npos, "wrong error: ", message);
  }
  broken->all_reduce(view_of(y));
  check(y[0] == float(group.size()), "other lanes do not go on");
}

void suite(Communicator& group) {
  every_type(group);
  started(group);
  started_errors_come_out(group);
  nan_survives(group);
  small_things(group);
  errors_are_common(group);
  splits(group);
  misuse(group);
}

// Random calls with random delays: every rank draws the same calls and its own delays.
void shuffled(Communicator& group, int calls) {
  std::uint64_t shared = 88172645463325252ull, own = shared + std::uint64_t(group.rank()) * 7919;
  const auto next = [](std::uint64_t& state) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
  };
  for (int i = 0; i < calls; ++i) {
    if (next(own) % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(next(own) % 300));
    const std::int64_t n = std::int64_t(1 + next(shared) % 3000);
    std::vector<float> mine = values<float>(group.rank(), n), all(std::size_t(n * group.size()));
    const int root = int(next(shared) % std::uint64_t(group.size()));
    switch (next(shared) % 5) {
      case 0:
        group.all_reduce(view_of(mine));
        check(mine[0] == reduction<float>(group.size(), 0, Reduce::sum), "all_reduce, call ", i);
        break;
      case 1:
        group.all_gather(view_of(all), view_of(mine));
        check(all[std::size_t(n * root)] == number<float>(value(root, 0)), "all_gather, call ", i);
        break;
      case 2:
        all = values<float>(group.rank(), n * group.size());
        group.reduce_scatter(view_of(mine), view_of(all));
        check(mine[0] == reduction<float>(group.size(), group.rank() * n, Reduce::sum), "reduce_scatter, call ", i);
        break;
      case 3:
        group.broadcast(view_of(mine), root);
        check(mine.back() == number<float>(value(root, n - 1)), "broadcast, call ", i);
        break;
      case 4:
        group.barrier();
        break;
    }
  }
}

// Random started calls of all lanes with random delays, a few of them under way at any time.
void overlapped(Communicator& group, int calls) {
  struct Call {
    std::vector<float> sum, sent, got;
    std::unique_ptr<Pending> summed, sending, receiving;
  };
  std::uint64_t shared = 362436069362436069ull, own = shared + std::uint64_t(group.rank()) * 7919;
  const auto next = [](std::uint64_t& state) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
  };
  std::vector<Call> under_way(4);
  for (int i = 0; i < calls + int(under_way.size()); ++i) {
    if (next(own) % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(next(own) % 300));
    Call& call = under_way[std::size_t(i) % under_way.size()];
    if (call.summed) {
      call.summed->wait();
      call.receiving->wait();
      call.sending.reset();
      check(call.sum[0] == reduction<float>(group.size(), 0, Reduce::sum), "sum, call ", i);
      check(same_bits(call.got, values<float>(before(group), std::int64_t(call.got.size()), 5)), "message, call ", i);
    }
    if (i >= calls) continue;
    const std::int64_t n = std::int64_t(1 + next(shared) % 20'000);
    call = {};
    call.sum = values<float>(group.rank(), n);
    call.sent = values<float>(group.rank(), n, 5);
    call.got.resize(std::size_t(n));
    call.summed = group.start_all_reduce(view_of(call.sum));
    call.receiving = group.start_recv(view_of(call.got), before(group));
    call.sending = group.start_send(view_of(call.sent), next_of(group));
  }
}

std::string error_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const std::exception& error) {
    return error.what();
  }
  return {};
}

}  // namespace

TEST_CASE("a group of one is a group") {
  Alone alone;
  suite(alone);
}

TEST_CASE("the world of this process is a group", "[mpi]") {
  suite(test_session().world());
  shuffled(test_session().world(), 300);
  if (test_session().world().size() > 1) overlapped(test_session().world(), 60);
}

TEST_CASE("ranks that use messages are a group", "[mpi]") {
  // 1000 bytes: every longer message is cut, as those beyond INT_MAX are
  for (const std::size_t longest : {std::size_t(1) << 30, std::size_t(1000)}) {
    const auto group = test_session().messages("by messages", longest);
    suite(*group);
    shuffled(*group, 100);
    if (group->size() > 1) overlapped(*group, 20);
  }
}

TEST_CASE("members say where ranks are", "[mpi]") {
  const Communicator& world = test_session().world();
  const Member& me = world.members()[std::size_t(world.rank())];
  CHECK(me.world_rank == world.rank());
  int last = 0;
  for (const Member& other : world.members()) {
    CHECK((other.node == me.node) == (other.host == me.host));
    last = std::max(last, other.node);
  }
  CHECK(last < world.size());
  CHECK(world.members()[0].node == 0);
  CHECK(me.pid == getpid());
  CHECK(name_of(me) == text("rank ", world.rank(), " on ", me.host, " (pid ", getpid(), ")"));
}

TEST_CASE("ranks of different calls are told so", "[mpi]") {
  Communicator& world = test_session().world();
  if (world.size() == 1 || world.members().back().node > 0) return;  // between nodes not every rank can know
  const auto group = world.split(0, 0, "pair of strangers");
  std::vector<float> x(world.rank() == 0 ? 4u : 5u);
  CHECK_THAT(error_of([&] { group->all_reduce(view_of(x)); }), Contains("pair of strangers") && Contains("all_reduce"));
  world.barrier();
}

TEST_CASE("a message of another length than expected names both ranks", "[mpi]") {
  Communicator& world = test_session().world();
  const auto group = test_session().messages("by messages");
  if (world.size() == 1) return;
  std::vector<float> x(world.rank() == 0 ? 5u : 4u);
  if (world.rank() == 0) group->send(view_of(x), 1);
  if (world.rank() == 1)
    CHECK_THAT(error_of([&] { group->recv(view_of(x), 0); }),
               Contains("by messages: rank 1 receives 16 bytes from rank 0"));
  world.barrier();
}

TEST_CASE("threads are ranks") {
  const int ranks = GENERATE(1, 2, 3, 4, 8);
  run_ranks(ranks, suite);
  run_ranks(ranks, [](Communicator& world) { shuffled(world, 200); });
  if (ranks > 1) run_ranks(ranks, [](Communicator& world) { overlapped(world, 40); });
}

TEST_CASE("an error does not wait for what was started with ranks that wait for this one") {
  const auto start = std::chrono::steady_clock::now();
  const std::string message = error_of([] {
    run_ranks(2, [](Communicator& world) {
      std::vector<float> x(10), y(10), z(10);
      if (world.rank() == 0) {
        const auto receive = world.start_recv(view_of(x), 1), later = world.start_recv(view_of(y), 1);
        const auto sum = world.start_all_reduce(view_of(z));
        fail_input("bad data");
      }
      world.recv(view_of(x), 0);
    });
  });
  CHECK(message == "bad data");
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(5));
}

TEST_CASE("a group that was given up ends its calls on every thread") {
  const std::string message = error_of([] {
    run_ranks(2, [](Communicator& world) {
      std::vector<float> x(10);
      if (world.rank() == 1) return world.recv(view_of(x), 0);
      std::thread giver([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        world.give_up();
      });
      const std::string error = error_of([&] { world.recv(view_of(x), 1); });
      giver.join();
      check(error.find("is no longer waited for; rank 0") != std::string::npos, error);
      world.send(view_of(x), 1);
    });
  });
  CHECK(message.empty());
}

TEST_CASE("a rank that fails ends the others, and its error is the one that is seen") {
  const int culprit = GENERATE(0, 1, 2);
  std::atomic<int> ended = 0;
  const auto body = [&](Communicator& world) {
    world.barrier();
    const struct Count {
      std::atomic<int>& n;
      ~Count() { ++n; }
    } count{ended};
    if (world.rank() == culprit) fail_input("bad data");
    std::vector<float> x(10);
    world.all_reduce(view_of(x));
  };
  const auto start = std::chrono::steady_clock::now();
  CHECK(error_of([&] { run_ranks(3, body); }) == "bad data");
  CHECK(ended == 3);
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(5));
}

TEST_CASE("a rank that leaves early is named by those who wait for it") {
  const std::string message = error_of([] {
    run_ranks(2, [](Communicator& world) {
      std::vector<float> x(10);
      if (world.rank() == 0) world.recv(view_of(x), 1);
    });
  });
  CHECK_THAT(message, Contains("rank 1 on this host") && Contains("has finished; rank 0 on this host") &&
                          Contains("in recv of world"));
}

TEST_CASE("a rank that lives but gives nothing is waited for only so long") {
  Patience patience;
  patience.peer_timeout = std::chrono::milliseconds(200);
  patience.stall_report = std::chrono::milliseconds(50);
  std::vector<std::string> reports;
  patience.report = [&](const std::string& line) { reports.push_back(line); };
  std::atomic<bool> over = false;
  try {
    run_ranks(2, [&](Communicator& world) {
      const auto group = world.split(0, 0, "dp 0");
      group->set_patience(patience);
      if (world.rank() == 0) {
        const struct Over {
          std::atomic<bool>& flag;
          ~Over() { flag = true; }
        } at_end{over};
        group->barrier();
      } else {
        while (!over) std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
    });
    FAIL("no error came");
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::peer_lost);
    CHECK_THAT(error.what(), Contains("rank 0 on this host") && Contains("s for rank 1 on this host") &&
                                 Contains("in barrier of dp 0: it lives but gives nothing (peer_timeout)"));
  }
  REQUIRE(reports.size() == 1);
  CHECK_THAT(reports[0], Contains("rank 0 on this host") && Contains("for rank 1 on this host") &&
                             Contains("in barrier of dp 0 and goes on waiting"));
}

TEST_CASE("a wait that lasts as long as the other lives is reported when it is long") {
  Patience patience;
  patience.peer_timeout = std::chrono::milliseconds(50);
  std::atomic<int> reports = 0;
  std::string line;
  patience.report = [&](const std::string& report) {
    line = report;
    ++reports;
  };
  run_ranks(2, [&](Communicator& world) {
    const auto group = world.split(0, 0, "dp 0");
    if (world.rank() == 0) {
      group->set_patience(patience.while_alive());
      const WaitForWork work(*group);  // within one another, too
      group->barrier();
    } else {
      for (int i = 0; i < 4000 && reports == 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      group->barrier();
    }
  });
  CHECK(reports == 1);
  CHECK_THAT(line, Contains("rank 0 on this host") && Contains("for rank 1 on this host") &&
                       Contains("in barrier of dp 0 and goes on waiting"));
}

TEST_CASE("waiting costs little processor time") {
  timespec before{}, after{};
  run_ranks(2, [&](Communicator& world) {
    world.barrier();
    if (world.rank() == 1) {
      std::this_thread::sleep_for(std::chrono::milliseconds(500));
      world.barrier();
    } else {
      clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before);
      world.barrier();
      clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after);
    }
  });
  const double cpu = double(after.tv_sec - before.tv_sec) + 1e-9 * double(after.tv_nsec - before.tv_nsec);
  CHECK(cpu < 0.1);  // about 0.01 s; sanitizers take more
}
