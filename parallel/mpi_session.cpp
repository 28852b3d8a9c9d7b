#include <mpi.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iostream>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "parallel/node_pulse.h"
#include "parallel/parallel.h"
#include "parallel/reduce.h"
#include "parallel/shared_group.h"
#include "parallel/shared_segment.h"
#include "parallel/wait.h"

namespace distill {

namespace {

std::string mpi_message(int code) {
  char message[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(code, message, &length);
  return {message, std::size_t(length)};
}

// Threads of this process take turns (MPI_THREAD_SERIALIZED): held for a call, never for a wait. The few calls that all
// ranks make together are made where all have arrived, so that none holds it while another cannot come.
std::mutex& mpi_turn() {
  static std::mutex turn;
  return turn;
}

void check_mpi(int code, const char* call) {
  if (code != MPI_SUCCESS) fail(call, ": ", mpi_message(code));
}

template <class Work>
auto with_turn(const Work& work) {
  const std::lock_guard turn(mpi_turn());
  return work();
}

std::size_t bytes_of(const ConstView& x) { return std::size_t(x.size()) * size_of(x.dtype); }

// Owns a communicator whose errors come back as codes.
class Comm {
 public:
  explicit Comm(MPI_Comm comm) : comm_(comm) {
    const std::lock_guard turn(mpi_turn());
    check_mpi(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  }
  Comm(Comm&& other) noexcept : comm_(std::exchange(other.comm_, MPI_COMM_NULL)) {}
  ~Comm() {
    const std::lock_guard turn(mpi_turn());
    if (comm_ != MPI_COMM_NULL) MPI_Comm_free(&comm_);
  }
  MPI_Comm get() const { return comm_; }

 private:
  MPI_Comm comm_;
};

// What the groups of a session share.
struct Node {
  std::shared_ptr<GroupMemory> memory = segment_memory();
  std::shared_ptr<NodeLives> lives;  // null until the session has them
  std::unique_ptr<NodePulse> pulse;  // on the first rank of a node, where there are several nodes
};

// A group that talks through MPI messages. Every operation posts all it has to send and to receive and naps until that
// is done, so it is always known who has not answered.
class MessageGroup final : public Communicator {
 public:
  enum class Within { shared, messages };  // what groups split off within one node use

  MessageGroup(std::string name, int rank, std::vector<Member> members, const Patience& patience, Comm comm,
               std::shared_ptr<Node> node, std::size_t longest_message, Within within)
      : Communicator(std::move(name), rank, std::move(members), patience),
        comm_(std::move(comm)),
        node_(std::move(node)),
        longest_message_(longest_message),
        within_(within) {}
  ~MessageGroup() override { finish_started(); }

 private:
  enum Tag { pair_tag, group_tag };
  static constexpr std::int64_t part_bytes = 1 << 20;  // of what one rank reduces at a time

  // The messages of one call.
  class Messages final : private Awaited {
   public:
    Messages(const MessageGroup& group, const char* call, Tag tag) : group_(group), call_(call), tag_(tag) {}
    Messages(const Messages&) = delete;

    void send(const void* data, std::size_t bytes, int to) { post(false, const_cast<void*>(data), bytes, to); }
    void receive(void* data, std::size_t bytes, int from) { post(true, data, bytes, from); }
    // Returns when all are done.
    void finish() {
      wait_until([this] { return progress(); }, group_.patience(), *this);
    }
    ~Messages() override {
      const std::lock_guard turn(mpi_turn());
      for (Message& message : under_way_) {  // after an error: their memory may be about to go
        MPI_Cancel(&message.request);
        MPI_Request_free(&message.request);
      }
    }

   private:
    struct Message {
      MPI_Request request;
      int peer, bytes;
      bool is_receive;
    };

    // Messages are cut at longest_message: counts of MPI 3 are int.
    void post(bool is_receive, void* data, std::size_t bytes, int peer) {
      const std::lock_guard turn(mpi_turn());
      std::size_t first = 0;
      do {  // once for an empty message, which a barrier is made of
        const int piece = int(std::min(group_.longest_message_, bytes - first));
        std::byte* const at = static_cast<std::byte*>(data) + first;
        const MPI_Comm comm = group_.comm_.get();
        Message message{MPI_REQUEST_NULL, peer, piece, is_receive};
        if (is_receive)
          check_mpi(MPI_Irecv(at, piece, MPI_BYTE, peer, tag_, comm, &message.request), "MPI_Irecv");
        else
          check_mpi(MPI_Isend(at, piece, MPI_BYTE, peer, tag_, comm, &message.request), "MPI_Isend");
        under_way_.push_back(message);
        first += std::size_t(piece);
      } while (first < bytes);
    }

    // Drops what is done from the end of the list; true when nothing is left.
    bool progress() {
      const std::lock_guard turn(mpi_turn());
      while (!under_way_.empty()) {
        if (!is_done(under_way_.back())) return false;
        under_way_.pop_back();
      }
      return true;
    }
    bool is_done(Message& message) const {
      int done = 0;
      MPI_Status status;
      const int code = MPI_Test(&message.request, &done, &status);
      if (code != MPI_SUCCESS)
        fail(group_.name(), ": rank ", group_.rank(), message.is_receive ? " receives " : " sends ", message.bytes,
             message.is_receive ? " bytes from" : " bytes to", " rank ", message.peer, ": ", mpi_message(code));
      if (!done || !message.is_receive) return done;
      int bytes = 0;
      check_mpi(MPI_Get_count(&status, MPI_BYTE, &bytes), "MPI_Get_count");
      check(bytes == message.bytes, group_.name(), ": rank ", group_.rank(), " receives ", message.bytes,
            " bytes where rank ", message.peer, " sends ", bytes);
      return true;
    }

    const Member& peer() const { return group_.members()[std::size_t(under_way_.back().peer)]; }
    std::string self() const override { return name_of(group_.members()[std::size_t(group_.rank())]); }
    std::string whom() const override { return name_of(peer()); }
    std::string purpose() const override { return text(call_, " of ", group_.name()); }
    std::string trouble() override {
      if (group_.is_given_up()) return "is no longer waited for";
      if (!group_.node_->lives) return {};
      return group_.node_->lives->trouble(peer().world_rank, group_.patience().peer_dead_after);
    }

    const MessageGroup& group_;
    const char* call_;
    Tag tag_;
    std::vector<Message> under_way_;
  };

  void do_all_reduce(View x, Reduce op) override {
    const std::int64_t width = std::int64_t(size_of(x.dtype)), n = size(), longest = part_bytes / width;
    std::byte* const data = static_cast<std::byte*>(x.mutable_data());
    for (std::int64_t first = 0; first < x.size(); first += n * longest) {
      // Rank p reduces part p of this piece and gives it to all.
      const std::int64_t piece = std::min(n * longest, x.size() - first), part = (piece + n - 1) / n;
      const auto begin = [&](int p) { return data + (first + std::min(p * part, piece)) * width; };
      const auto length = [&](int p) { return begin(p + 1) - begin(p); };  // bytes
      Messages parts(*this, "all_reduce", group_tag);
      receive_parts(parts, std::size_t(length(rank())));
      for (const int p : others()) parts.send(begin(p), std::size_t(length(p)), p);
      parts.finish();
      reduce_parts(begin(rank()), begin(rank()), length(rank()) / width, x.dtype, op);
      Messages sums(*this, "all_reduce", group_tag);
      for (const int p : others()) sums.receive(begin(p), std::size_t(length(p)), p);
      for (const int p : others()) sums.send(begin(rank()), std::size_t(length(rank())), p);
      sums.finish();
    }
  }

  void do_reduce_scatter(View mine, const ConstView& all, Reduce op) override {
    const std::int64_t width = std::int64_t(size_of(mine.dtype)), longest = part_bytes / width;
    const std::byte* const data = static_cast<const std::byte*>(all.data);
    std::byte* const out = static_cast<std::byte*>(mine.mutable_data());
    for (std::int64_t first = 0; first < mine.size(); first += longest) {
      const std::int64_t part = std::min(longest, mine.size() - first);
      const auto source = [&](int p) { return data + (p * mine.size() + first) * width; };
      Messages parts(*this, "reduce_scatter", group_tag);
      receive_parts(parts, std::size_t(part * width));
      for (const int p : others()) parts.send(source(p), std::size_t(part * width), p);
      parts.finish();
      reduce_parts(out + first * width, source(rank()), part, mine.dtype, op);
    }
  }

  // Values of the others for this rank to reduce: received_ by rank.
  void receive_parts(Messages& parts, std::size_t bytes) {
    received_.resize(bytes * std::size_t(size()));
    for (const int p : others()) parts.receive(received_.data() + std::size_t(p) * bytes, bytes, p);
  }
  void reduce_parts(std::byte* out, const std::byte* own, std::int64_t count, DType dtype, Reduce op) {
    const std::size_t bytes = std::size_t(count) * size_of(dtype);
    parts_.resize(std::size_t(size()));
    for (int r = 0; r < size(); ++r)
      parts_[std::size_t(r)] = r == rank() ? own : received_.data() + std::size_t(r) * bytes;
    reduce_in_order(out, parts_, count, dtype, op);
  }

  void do_all_gather(View all, const ConstView& mine) override {
    do_all_gather_bytes(all.mutable_data(), mine.data, bytes_of(mine));
  }
  void do_broadcast(View x, int root) override { do_broadcast_bytes(x.mutable_data(), bytes_of(x), root); }
  void do_barrier() override { exchange(nullptr, nullptr, 0, "barrier"); }

  void do_all_gather_bytes(void* all, const void* mine, std::size_t bytes) override {
    std::memmove(static_cast<std::byte*>(all) + std::size_t(rank()) * bytes, mine, bytes);
    exchange(all, mine, bytes, "all_gather");
  }
  void exchange(void* all, const void* mine, std::size_t bytes, const char* call) {
    Messages messages(*this, call, group_tag);
    for (const int p : others()) messages.receive(static_cast<std::byte*>(all) + std::size_t(p) * bytes, bytes, p);
    for (const int p : others()) messages.send(mine, bytes, p);
    messages.finish();
  }

  void do_broadcast_bytes(void* x, std::size_t bytes, int root) override {
    Messages messages(*this, "broadcast", group_tag);
    if (rank() != root)
      messages.receive(x, bytes, root);
    else
      for (const int p : others()) messages.send(x, bytes, p);
    messages.finish();
  }

  void do_send(const ConstView& x, int to) override {
    Messages message(*this, "send", pair_tag);
    message.send(x.data, bytes_of(x), to);
    message.finish();
  }
  void do_recv(View x, int from) override {
    Messages message(*this, "recv", pair_tag);
    message.receive(x.mutable_data(), bytes_of(x), from);
    message.finish();
  }

  std::unique_ptr<Communicator> do_split(const std::vector<int>& parents, int group, std::string name) override {
    const bool shared =
        parents.size() == 1 || (within_ == Within::shared && std::all_of(parents.begin(), parents.end(), [&](int r) {
                                  return members()[std::size_t(r)].node == members()[std::size_t(parents.front())].node;
                                }));
    auto near = make_shared_group(*this, shared ? parents : std::vector<int>{}, name, node_->lives, node_->memory);
    const auto found = std::find(parents.begin(), parents.end(), rank());
    const int new_rank = shared ? -1 : int(found - parents.begin());
    // All ranks of this group are here: make_shared_group waited for them.
    const MPI_Comm comm = with_turn([&] {
      MPI_Comm made = MPI_COMM_NULL;
      check_mpi(MPI_Comm_split(comm_.get(), shared || parents.empty() ? MPI_UNDEFINED : group, new_rank, &made),
                "MPI_Comm_split");
      return made;
    });
    if (comm == MPI_COMM_NULL) return near;
    std::vector<Member> chosen;
    for (const int r : parents) chosen.push_back(members()[std::size_t(r)]);
    return std::make_unique<MessageGroup>(std::move(name), new_rank, std::move(chosen), patience(), Comm(comm), node_,
                                          longest_message_, within_);
  }

  // The other ranks, starting after this one, so that not everybody sends to rank 0 first.
  std::vector<int> others() const {
    std::vector<int> ranks;
    for (int i = 1; i < size(); ++i) ranks.push_back((rank() + i) % size());
    return ranks;
  }

  Comm comm_;
  std::shared_ptr<Node> node_;
  std::size_t longest_message_;
  Within within_;
  std::vector<std::byte> received_;  // these two are of collectives, which never run at the same time
  std::vector<const void*> parts_;
};

std::string host_name() {
  char name[256] = "";
  return gethostname(name, sizeof name - 1) == 0 ? name : "unknown host";
}

// After the loss of a node: time for mpirun to end the run by itself. Then how long MPI_Abort may take to end this
// process, which after that ends itself. With peer_dead_after all of it is less than half a minute.
constexpr std::chrono::seconds launcher_grace(6), abort_grace(2), explanation_grace(2);

// Number of this rank's node: nodes are counted in the order of their lowest ranks.
int node_number(int rank, int ranks) {
  MPI_Comm node = MPI_COMM_NULL;
  check_mpi(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &node),
            "MPI_Comm_split_type");
  const Comm owned(node);
  int lowest = rank;
  check_mpi(MPI_Bcast(&lowest, 1, MPI_INT, 0, node), "MPI_Bcast");
  std::vector<int> all(std::size_t(ranks), 0);
  check_mpi(MPI_Allgather(&lowest, 1, MPI_INT, all.data(), 1, MPI_INT, MPI_COMM_WORLD), "MPI_Allgather");
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return int(std::lower_bound(all.begin(), all.end(), lowest) - all.begin());
}

// Ranks of each node, in their order.
std::vector<std::vector<int>> ranks_by_node(const Communicator& world) {
  std::vector<std::vector<int>> nodes;
  for (int r = 0; r < world.size(); ++r) {
    const std::size_t node = std::size_t(world.members()[std::size_t(r)].node);
    if (node >= nodes.size()) nodes.resize(node + 1);
    nodes[node].push_back(r);
  }
  return nodes;
}

// Signs of life of all ranks in memory that those of this node share; the signs of a node lie side by side. Every rank
// of world calls it.
void start_lives(Communicator& world, Node& node) {
  const std::vector<std::vector<int>> nodes = ranks_by_node(world);
  const std::size_t own = std::size_t(world.members()[std::size_t(world.rank())].node);
  const int speaker = nodes[own].front();  // makes the table and speaks with other nodes
  std::vector<int> order;                  // which rank signs at each index
  for (const std::vector<int>& ranks : nodes) order.insert(order.end(), ranks.begin(), ranks.end());
  const auto index_of = [&](int rank) {
    return std::size_t(std::find(order.begin(), order.end(), rank) - order.begin());
  };
  const std::size_t bytes = order.size() * sizeof(LifeSign);
  GroupMemory::Block block;
  std::string ticket;
  world.run_together([&] {
    if (speaker != world.rank()) return;
    block = node.memory->make(bytes, "the table of ranks", ticket);
    if (nodes.size() > 1) node.pulse = std::make_unique<NodePulse>();
  });
  const std::vector<std::string> tickets = world.all_gather(ticket);
  world.run_together([&] {
    if (!block) block = node.memory->attach(tickets[std::size_t(speaker)], bytes);
    node.lives = std::make_shared<NodeLives>(block, order.size(), index_of(world.rank()));
  });
  if (speaker == world.rank()) node.memory->seal(ticket);
  for (const int rank : order)
    if (const int its_node = world.members()[std::size_t(rank)].node; its_node != int(own))
      node.lives->watch_far(rank, its_node, index_of(rank), speaker);
    else if (rank != world.rank())
      node.lives->watch(rank, index_of(rank));
  if (nodes.size() == 1) return;

  const std::string secret = world.broadcast(world.rank() == 0 ? NodePulse::make_secret() : "", 0);
  const std::vector<std::string> cards = world.all_gather(node.pulse ? node.pulse->card() : "");
  if (!node.pulse) return;
  std::vector<Station> stations;
  for (const std::vector<int>& ranks : nodes) {
    const std::size_t first = std::size_t(ranks.front());
    LifeSign* const signs = reinterpret_cast<LifeSign*>(block.get()) + index_of(ranks.front());
    stations.push_back({world.members()[first].host, cards[first], {signs, ranks.size()}});
  }
  node.pulse->start(std::move(stations), own, block, secret);
}

}  // namespace

struct MpiSession::State {
  std::vector<Member> members;  // of this rank alone until there is a world
  int rank = 0, ranks = 0, threads_provided = 0;
  std::shared_ptr<Node> node = std::make_shared<Node>();
  std::unique_ptr<Communicator> world;
  std::atomic<bool> stop_asked = false;  // of a world of one
  int exceptions_at_start = 0;

  const Member& me() const { return members[members.size() == 1 ? 0 : std::size_t(rank)]; }
};

MpiSession::MpiSession(int& argc, char**& argv) : state_(std::make_unique<State>()) {
  state_->exceptions_at_start = std::uncaught_exceptions();
  check_mpi(MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &state_->threads_provided), "MPI_Init_thread");
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  MPI_Comm_rank(MPI_COMM_WORLD, &state_->rank);
  MPI_Comm_size(MPI_COMM_WORLD, &state_->ranks);
  state_->members = {{state_->rank, 0, host_name(), getpid()}};
}

Communicator& MpiSession::world() {
  if (!state_->world) make_world();
  return *state_->world;
}

void MpiSession::make_world() {
  check(state_->threads_provided >= MPI_THREAD_SERIALIZED,
        "this MPI library does not let threads take turns (MPI_THREAD_SERIALIZED)");
  const int ranks = state_->ranks;
  Member me = state_->me();
  if (ranks == 1) {
    state_->world = std::make_unique<Alone>("world", me);
    return;
  }
  me.node = node_number(me.world_rank, ranks);
  state_->members.assign(std::size_t(ranks), me);  // until they are known
  const auto first = messages("world");
  const int numbers[2] = {me.node, int(me.pid)};
  const std::string packed(reinterpret_cast<const char*>(numbers), sizeof numbers);
  const std::vector<std::string> all = first->all_gather(packed + me.host);
  for (int r = 0; r < ranks; ++r) {
    const std::string& from = all[std::size_t(r)];
    int other[2];
    std::memcpy(other, from.data(), sizeof other);
    state_->members[std::size_t(r)] = {r, other[0], from.substr(sizeof other), other[1]};
  }
  auto named = messages("world");
  if (ranks_of_node(*named).front() == me.world_rank) SharedSegment::remove_leftovers();
  start_lives(*named, *state_->node);
  const bool one_node =
      std::all_of(state_->members.begin(), state_->members.end(), [](const Member& m) { return m.node == 0; });
  std::vector<int> everybody;
  for (int r = 0; r < ranks; ++r) everybody.push_back(r);
  state_->world = one_node ? make_shared_group(*named, everybody, "world", state_->node->lives, state_->node->memory)
                           : std::move(named);
}

MpiSession::~MpiSession() {
  if (std::uncaught_exceptions() > state_->exceptions_at_start) abort_all(int(ExitCode::internal));
  try {
    // MPI_Finalize would burn the core while it waits. Others may work for long after this rank has done its part.
    if (Communicator* const all = state_->world.get()) {
      all->set_patience(all->patience().while_alive());
      all->barrier();
    }
  } catch (const std::exception& error) {
    await_explanation();
    std::cerr << text("distill: ", name_of(me()), ": ", error.what(), "\n");
    abort_all(int(ExitCode::peer_lost));
  }
  if (state_->node->lives) state_->node->lives->end_watch();  // it uses the state
  state_.reset();
  MPI_Finalize();
}

const Member& MpiSession::me() const { return state_->me(); }
int MpiSession::ranks() const { return state_->ranks; }

void MpiSession::ask_to_stop() {
  state_->stop_asked = true;
  if (state_->node->lives) state_->node->lives->ask_to_stop();
}

bool MpiSession::stop_asked() const {
  return state_->stop_asked || (state_->node->lives && state_->node->lives->stop_asked());
}

void MpiSession::watch_nodes(std::chrono::milliseconds dead_after) {
  const bool speaks = ranks_of_node(world()).front() == world().rank();
  if (!state_->node->lives) return;
  state_->node->lives->watch_nodes(dead_after, [this, speaks](int rank, const std::string& trouble) {
    if (speaks)
      std::cerr << text("distill: ", name_of(me()), ": ", name_of(state_->members[std::size_t(rank)]), " ", trouble,
                        ", like all ranks of its node\n")
                << std::flush;
    abort_all(int(ExitCode::peer_lost));
  });
}

void MpiSession::watch_ranks(std::chrono::milliseconds dead_after) {
  if (!state_->node->lives) return;
  state_->node->lives->watch_neighbours(dead_after, [this](int rank, const std::string& trouble) {
    await_explanation();
    std::cerr << text("distill: ", name_of(me()), ": ", name_of(state_->members[std::size_t(rank)]), " ", trouble, "\n")
              << std::flush;
    abort_all(int(ExitCode::peer_lost));
  });
}

std::unique_ptr<Communicator> MpiSession::messages(std::string name, std::size_t longest_message) {
  check(longest_message > 0 && longest_message <= std::size_t(INT_MAX), "messages of ", longest_message, " bytes");
  const bool is_extra = state_->world != nullptr;  // the world itself uses messages only where it must
  if (is_extra) state_->world->barrier();          // all are here (mpi_turn)
  MPI_Comm comm = MPI_COMM_NULL;
  int rank = 0;
  with_turn([&] {
    check_mpi(MPI_Comm_dup(MPI_COMM_WORLD, &comm), "MPI_Comm_dup");
    check_mpi(MPI_Comm_rank(comm, &rank), "MPI_Comm_rank");
  });
  return std::make_unique<MessageGroup>(
      std::move(name), rank, state_->members, is_extra ? state_->world->patience() : Patience{}, Comm(comm),
      state_->node, longest_message, is_extra ? MessageGroup::Within::messages : MessageGroup::Within::shared);
}

void MpiSession::await_explanation() const {
  if (!state_->node->lives) return;
  const auto until = std::chrono::steady_clock::now() + explanation_grace;
  while (!state_->node->lives->has_said_why()) {
    if (std::chrono::steady_clock::now() > until) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  std::this_thread::sleep_for(launcher_grace);
}

void MpiSession::abort_all(int code) {
  std::cout << std::flush;
  std::cerr << std::flush;
  if (state_->node->lives) state_->node->lives->say_why();
  // mpirun may be about to notice the loss of a node, and then ends the run in order. What an abort would have it send
  // there is never answered, and keeps it from noticing until TCP gives up, a quarter of an hour later.
  if (state_->node->lives && state_->node->lives->has_lost_far()) std::this_thread::sleep_for(launcher_grace);
  // Another thread may hold the turn for good, and MPI_Abort may wait for a node that is gone.
  std::thread([code] {
    std::this_thread::sleep_for(abort_grace);
    std::_Exit(code);
  }).detach();
  mpi_turn().lock();  // for good: no other thread is within MPI any more
  MPI_Abort(MPI_COMM_WORLD, code);
  std::_Exit(code);
}

std::string MpiSession::library_version() {
  char version[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int length = 0;
  MPI_Get_library_version(version, &length);
  const std::string all(version, std::size_t(length));
  return all.substr(0, all.find(','));  // what follows the first comma says who packaged it
}

}  // namespace distill
