#include "core/communicator.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <iostream>
#include <limits>
#include <map>
#include <utility>

namespace distill {

namespace {

std::size_t bytes_of(const ConstView& x) { return std::size_t(x.size()) * size_of(x.dtype); }

void copy_unless_same(View to, const ConstView& from) {
  if (to.data != from.data && from.size() > 0) std::memmove(to.mutable_data(), from.data, bytes_of(from));
}

template <class T>
T reduced(T a, T b, Reduce op) {
  if (op == Reduce::sum) return a + b;
  if (b != b) return b;  // NaN survives
  return (op == Reduce::max ? b > a : b < a) ? b : a;
}

// gathered: size·x.size() values, rank by rank.
template <class T>
void reduce_gathered(std::span<T> x, const std::vector<T>& gathered, Reduce op) {
  for (std::size_t i = 0; i < x.size(); ++i) {
    T value = gathered[i];
    for (std::size_t at = i + x.size(); at < gathered.size(); at += x.size()) value = reduced(value, gathered[at], op);
    x[i] = value;
  }
}

// What is done as soon as it is started.
class Done final : public Pending {
 public:
  void wait() override {}
  bool is_done() const override { return true; }
};

}  // namespace

std::string name_of(const Member& member) {
  return text("rank ", member.world_rank, " on ", member.host.empty() ? "this host" : member.host, " (pid ", member.pid,
              ")");
}

Communicator::Communicator(std::string name, int rank, std::vector<Member> members, const Patience& patience)
    : name_(std::move(name)),
      rank_(rank),
      members_(std::move(members)),
      patience_(patience),
      exceptions_at_start_(std::uncaught_exceptions()) {
  check(rank_ >= 0 && rank_ < size(), name_, ": rank ", rank_, " of ", size());
}

void Patience::say(const std::string& line) const {
  if (report)
    report(line);
  else
    std::cerr << line + "\n" << std::flush;
}

void Communicator::give_up() {
  for (Lane* lane : {&collectives_, &sends_, &receives_}) lane->give_up();
}

bool Communicator::is_given_up() const {
  return collectives_.is_given_up() || sends_.is_given_up() || receives_.is_given_up();
}

void Communicator::finish_started() {
  if (std::uncaught_exceptions() > exceptions_at_start_) give_up();
  for (Lane* lane : {&collectives_, &sends_, &receives_}) lane->stop();
}

// What begins does so in start(); in a group of one work() does all there is to do at once.
template <class Start, class Work>
static std::unique_ptr<Pending> begin(const Communicator& group, std::int64_t elements, const Start& start,
                                      const Work& work) {
  if (elements > 0 && group.size() > 1) return start();
  if (elements > 0) work();
  return std::make_unique<Done>();
}

void Communicator::all_reduce(View x, Reduce op) {
  check(x.contiguous(), name_, ": all_reduce of ", x, " with stride ", x.stride);
  collectives_.finish();
  if (x.size() > 0) do_all_reduce(x, op);
}

std::unique_ptr<Pending> Communicator::start_all_reduce(View x, Reduce op) {
  check(x.contiguous(), name_, ": all_reduce of ", x, " with stride ", x.stride);
  return begin(
      *this, x.size(), [&] { return do_start_all_reduce(x, op); }, [&] { do_all_reduce(x, op); });
}

void Communicator::check_reduce_scatter(const View& mine, const ConstView& all) const {
  check(mine.contiguous() && all.contiguous() && mine.dtype == all.dtype && all.size() == mine.size() * size(), name_,
        ": reduce_scatter of ", all, " to ", mine, " with ", size(), " ranks");
}

void Communicator::reduce_scatter(View mine, const ConstView& all, Reduce op) {
  check_reduce_scatter(mine, all);
  collectives_.finish();
  if (mine.size() > 0) do_reduce_scatter(mine, all, op);
}

std::unique_ptr<Pending> Communicator::start_reduce_scatter(View mine, const ConstView& all, Reduce op) {
  check_reduce_scatter(mine, all);
  return begin(
      *this, mine.size(), [&] { return do_start_reduce_scatter(mine, all, op); },
      [&] { do_reduce_scatter(mine, all, op); });
}

void Communicator::check_all_gather(const View& all, const ConstView& mine) const {
  check(mine.contiguous() && all.contiguous() && mine.dtype == all.dtype && all.size() == mine.size() * size(), name_,
        ": all_gather of ", mine, " to ", all, " with ", size(), " ranks");
}

void Communicator::all_gather(View all, const ConstView& mine) {
  check_all_gather(all, mine);
  collectives_.finish();
  if (mine.size() > 0) do_all_gather(all, mine);
}

std::unique_ptr<Pending> Communicator::start_all_gather(View all, const ConstView& mine) {
  check_all_gather(all, mine);
  return begin(
      *this, mine.size(), [&] { return do_start_all_gather(all, mine); }, [&] { do_all_gather(all, mine); });
}

void Communicator::broadcast(View x, int root) {
  check(x.contiguous(), name_, ": broadcast of ", x, " with stride ", x.stride);
  check(root >= 0 && root < size(), name_, ": broadcast from rank ", root, " of ", size());
  collectives_.finish();
  if (x.size() > 0) do_broadcast(x, root);
}

void Communicator::check_pair(const ConstView& x, int other, const char* call) const {
  check(x.contiguous(), name_, ": ", call, " of ", x, " with stride ", x.stride);
  check_other(other, call);
}

void Communicator::check_other(int other, const char* call) const {
  check(other >= 0 && other < size() && other != rank_, name_, ": ", call, " by rank ", rank_, " of ", size(),
        ", other rank ", other);
}

void Communicator::send(const ConstView& x, int to) {
  check_pair(x, to, "send");
  sends_.finish();
  if (x.size() > 0) do_send(x, to);
}

std::unique_ptr<Pending> Communicator::start_send(const ConstView& x, int to) {
  check_pair(x, to, "send");
  return begin(
      *this, x.size(), [&] { return do_start_send(x, to); }, [&] { do_send(x, to); });
}

void Communicator::recv(View x, int from) {
  check_pair(x, from, "recv");
  receives_.finish();
  if (x.size() > 0) do_recv(x, from);
}

std::unique_ptr<Pending> Communicator::start_recv(View x, int from) {
  check_pair(x, from, "recv");
  return begin(
      *this, x.size(), [&] { return do_start_recv(x, from); }, [&] { do_recv(x, from); });
}

void Communicator::barrier() {
  collectives_.finish();
  do_barrier();
}

std::unique_ptr<Pending> Communicator::do_start_all_reduce(View x, Reduce op) {
  return collectives_.start([this, x, op] { do_all_reduce(x, op); });
}
std::unique_ptr<Pending> Communicator::do_start_reduce_scatter(View mine, const ConstView& all, Reduce op) {
  return collectives_.start([this, mine, all, op] { do_reduce_scatter(mine, all, op); });
}
std::unique_ptr<Pending> Communicator::do_start_all_gather(View all, const ConstView& mine) {
  return collectives_.start([this, all, mine] { do_all_gather(all, mine); });
}
std::unique_ptr<Pending> Communicator::do_start_send(const ConstView& x, int to) {
  return sends_.start([this, x, to] { do_send(x, to); });
}
std::unique_ptr<Pending> Communicator::do_start_recv(View x, int from) {
  return receives_.start([this, x, from] { do_recv(x, from); });
}

void Communicator::do_send_words(std::span<const std::int32_t> words, int to) {
  const std::int64_t n = std::int64_t(words.size());
  do_send({words.data(), 1, n, n, DType::i32}, to);
}
void Communicator::do_recv_words(std::span<std::int32_t> words, int from) {
  do_recv({words.data(), 1, std::int64_t(words.size()), DType::i32}, from);
}

void Communicator::gather_bytes(void* all, const void* mine, std::size_t bytes) {
  collectives_.finish();
  do_all_gather_bytes(all, mine, bytes);
}

void Communicator::broadcast_bytes(void* x, std::size_t bytes, int root) {
  collectives_.finish();
  do_broadcast_bytes(x, bytes, root);
}

std::unique_ptr<Communicator> Communicator::split(int color, int key, std::string name) {
  const int mine[2] = {color, key};
  std::vector<int> all(2 * members_.size());
  gather_bytes(all.data(), mine, sizeof mine);
  std::map<int, std::vector<std::pair<int, int>>> groups;  // color → (key, rank)
  for (int r = 0; r < size(); ++r)
    if (all[2 * r] >= 0) groups[all[2 * r]].emplace_back(all[2 * r + 1], r);
  std::vector<int> parents;
  int group = -1;
  if (const auto found = groups.find(color); found != groups.end()) {
    group = int(std::distance(groups.begin(), found));
    std::sort(found->second.begin(), found->second.end());
    for (const auto& [_, r] : found->second) parents.push_back(r);
  }
  return do_split(parents, group, std::move(name));
}

void Communicator::all_reduce(std::span<double> x, Reduce op) {
  std::vector<double> all(x.size() * members_.size());
  if (x.empty()) return;
  gather_bytes(all.data(), x.data(), x.size_bytes());
  reduce_gathered(x, all, op);
}

void Communicator::all_reduce(std::span<std::int64_t> x, Reduce op) {
  std::vector<std::int64_t> all(x.size() * members_.size());
  if (x.empty()) return;
  gather_bytes(all.data(), x.data(), x.size_bytes());
  reduce_gathered(x, all, op);
}

double Communicator::all_reduce(double x, Reduce op) {
  all_reduce(std::span(&x, 1), op);
  return x;
}

std::int64_t Communicator::all_reduce(std::int64_t x, Reduce op) {
  all_reduce(std::span(&x, 1), op);
  return x;
}

std::string Communicator::broadcast(std::string_view bytes, int root) {
  check(root >= 0 && root < size(), name_, ": broadcast from rank ", root, " of ", size());
  std::uint64_t length = bytes.size();
  broadcast_bytes(&length, sizeof length, root);
  std::string out = rank_ == root ? std::string(bytes) : std::string(length, '\0');
  if (length > 0) broadcast_bytes(out.data(), length, root);
  return out;
}

std::vector<std::string> Communicator::all_gather(std::string_view bytes) {
  const std::uint64_t length = bytes.size();
  std::vector<std::uint64_t> lengths(members_.size());
  gather_bytes(lengths.data(), &length, sizeof length);
  const std::size_t longest = *std::max_element(lengths.begin(), lengths.end());
  std::string mine(bytes), all(longest * members_.size(), '\0');
  mine.resize(longest);
  if (longest > 0) gather_bytes(all.data(), mine.data(), longest);
  std::vector<std::string> out;
  for (std::size_t r = 0; r < members_.size(); ++r) out.push_back(all.substr(r * longest, lengths[r]));
  return out;
}

void Communicator::send(std::string_view bytes, int to) {
  check_other(to, "send");
  sends_.finish();
  check(bytes.size() <= std::size_t(std::numeric_limits<std::int32_t>::max()), name_, ": send of ", bytes.size(),
        " bytes");
  const std::int32_t length = std::int32_t(bytes.size());
  do_send_words({&length, 1}, to);
  std::vector<std::int32_t> words((bytes.size() + 3) / 4);
  if (words.empty()) return;
  std::memcpy(words.data(), bytes.data(), bytes.size());
  do_send_words(words, to);
}

std::string Communicator::recv(int from) {
  check_other(from, "recv");
  receives_.finish();
  std::int32_t length = 0;
  do_recv_words({&length, 1}, from);
  std::vector<std::int32_t> words((std::size_t(length) + 3) / 4);
  if (!words.empty()) do_recv_words(words, from);
  return {reinterpret_cast<const char*>(words.data()), std::size_t(length)};
}

bool Communicator::all_equal(std::string_view bytes) {
  const std::vector<std::string> values = all_gather(bytes);
  return std::all_of(values.begin(), values.end(), [&](const std::string& value) { return value == values.front(); });
}

void Communicator::run_together(const std::function<void()>& work) {
  ExitCode code = ExitCode::ok;
  std::string message;
  try {
    work();
  } catch (const Error& error) {
    code = error.code();
    message = error.what();
  } catch (const std::exception& error) {
    code = ExitCode::internal;
    message = error.what();
  }
  const auto codes = all_gather(std::string(1, char(code)));
  const auto failed = std::find_if(codes.begin(), codes.end(), [](const std::string& c) { return c[0] != 0; });
  if (failed == codes.end()) return;
  const int root = int(failed - codes.begin());
  const std::string first = broadcast(message, root);
  throw CommonError(ExitCode(codes[std::size_t(root)][0]), first);
}

Alone::Alone(std::string name, Member member)
    : Communicator(std::move(name), 0, std::vector<Member>{std::move(member)}, {}) {}

void Alone::do_all_reduce(View, Reduce) {}
void Alone::do_reduce_scatter(View mine, const ConstView& all, Reduce) { copy_unless_same(mine, all); }
void Alone::do_all_gather(View all, const ConstView& mine) { copy_unless_same(all, mine); }
void Alone::do_broadcast(View, int) {}
void Alone::do_send(const ConstView&, int) {}  // no other rank exists: the public half refused already
void Alone::do_recv(View, int) {}
void Alone::do_barrier() {}
void Alone::do_all_gather_bytes(void* all, const void* mine, std::size_t bytes) { std::memmove(all, mine, bytes); }
void Alone::do_broadcast_bytes(void*, std::size_t, int) {}

std::unique_ptr<Communicator> Alone::do_split(const std::vector<int>& parents, int, std::string name) {
  if (parents.empty()) return nullptr;
  auto group = std::make_unique<Alone>(std::move(name), members().front());
  group->set_patience(patience());
  return group;
}

}  // namespace distill
