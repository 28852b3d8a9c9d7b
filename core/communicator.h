// The contract of a group of ranks. Public methods check, private virtuals do the work, so an operation that an
// implementation lacks does not compile. A group of one is a group (class Alone): no layer asks whether it is parallel.
//
// Every rank of a group makes the same calls in the same order with the same shapes. Views are contiguous and lie where
// the implementation says: host memory for threads and MPI, the device's for a GroupOnDevice (core/group_on_device.h);
// "small things" lie in host memory whatever the group. Same group size, same bits: in host memory ranks 0, 1, 2, … are
// added in that order, 16-bit formats in f32, rounded once; NCCL has an order of its own and may round every sum. NaN
// survives sum, max and min. A call that waits for a rank that died, or for one that gives nothing for `peer_timeout`,
// ends with Error(ExitCode::peer_lost) that names who waited for whom.
//
// Calls are of three kinds that do not disturb each other: sends, receives, and all others (collectives). One thread at
// a time makes calls of one kind. start_… begins an operation that runs while the caller goes on; operations of one
// kind run in the order started, and a blocking call of a kind waits for the started ones of its kind first.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/lane.h"
#include "core/tensor.h"

namespace distill {

enum class Reduce { sum, max, min };

// A rank as messages name it.
struct Member {
  int world_rank = 0;
  int node = 0;  // ranks with the same number share memory
  std::string host;
  long pid = 0;
};
std::string name_of(const Member& member);  // "rank 3 on node-a (pid 4711)"

// How long to wait for another rank.
struct Patience {
  std::chrono::milliseconds peer_dead_after = std::chrono::seconds(20);  // no sign of life: it is dead or stopped
  std::chrono::milliseconds peer_timeout = std::chrono::minutes(10);     // alive, but gives nothing
  std::chrono::milliseconds stall_report = std::chrono::seconds(30);     // once per wait: report who waits for whom
  std::function<void(const std::string&)> report;                        // takes that line; stderr when empty

  void say(const std::string& line) const;  // by `report`

  // The same for waits that last as long as the other lives: after peer_timeout they report who waits for whom, once,
  // and go on.
  Patience while_alive() const {
    constexpr std::chrono::hours for_ever(24 * 365);
    Patience endless = *this;
    if (peer_timeout < for_ever) endless.stall_report = peer_timeout;
    endless.peer_timeout = for_ever;
    return endless;
  }
};

// An error that every rank of a group throws: one of them prints it, none has to end the others.
class CommonError final : public Error {
 public:
  using Error::Error;
};

class Communicator {
 public:
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  const std::string& name() const { return name_; }  // "world", "dp 0": what messages call this group
  int rank() const { return rank_; }
  int size() const { return int(members_.size()); }
  const std::vector<Member>& members() const { return members_; }  // by rank of this group
  const Patience& patience() const { return patience_; }
  virtual void set_patience(const Patience& patience) { patience_ = patience; }  // groups split off later take it over

  // --- tensors
  void all_reduce(View x, Reduce op = Reduce::sum);  // in place
  // all [size·n] elements, mine [n]: rank r gets the reduction of elements [r·n, (r+1)·n). mine may be that part of
  // all.
  void reduce_scatter(View mine, const ConstView& all, Reduce op = Reduce::sum);
  // all [size·n] elements, mine [n]: element r·n + i of all is element i of rank r. mine may be that part of all.
  void all_gather(View all, const ConstView& mine);
  void broadcast(View x, int root);
  // Pairs match in order. A send may wait for its recv, so two ranks that both send first may wait for ever: start the
  // sends and go on.
  void send(const ConstView& x, int to);
  void recv(View x, int from);
  void barrier();

  // --- the same, begun (core/lane.h). What is started in one order here is met in the same order by the other ranks:
  // all sends of this rank wait behind one that is not yet received, all its receives behind one that is not yet sent.
  std::unique_ptr<Pending> start_all_reduce(View x, Reduce op = Reduce::sum);
  std::unique_ptr<Pending> start_reduce_scatter(View mine, const ConstView& all, Reduce op = Reduce::sum);
  std::unique_ptr<Pending> start_all_gather(View all, const ConstView& mine);
  std::unique_ptr<Pending> start_send(const ConstView& x, int to);
  std::unique_ptr<Pending> start_recv(View x, int from);
  // Every call of this rank that waits for another rank in this group ends with an error, on whichever thread it is.
  // Afterwards the group is good for nothing but to be destroyed. Any thread.
  virtual void give_up();

  // Ranks of one color form a group, ordered by key, then by rank; a negative color takes part in none (null).
  std::unique_ptr<Communicator> split(int color, int key, std::string name);

  // --- small things in host memory
  void all_reduce(std::span<double> x, Reduce op = Reduce::sum);
  void all_reduce(std::span<std::int64_t> x, Reduce op = Reduce::sum);
  double all_reduce(double x, Reduce op = Reduce::sum);
  std::int64_t all_reduce(std::int64_t x, Reduce op = Reduce::sum);
  bool any(bool mine) { return all_reduce(std::int64_t{mine}, Reduce::max) != 0; }
  bool all(bool mine) { return all_reduce(std::int64_t{mine}, Reduce::min) != 0; }
  // What root passed; the argument of the others is ignored.
  std::string broadcast(std::string_view bytes, int root);
  // What each rank passed, by rank, on every rank.
  std::vector<std::string> all_gather(std::string_view bytes);
  // Pairs match in order, as above.
  void send(std::string_view bytes, int to);
  std::string recv(int from);
  // True on every rank when all passed the same bytes.
  bool all_equal(std::string_view bytes);
  // Runs work on every rank. Where it throws on any, every rank throws the error of the lowest rank it failed on, as a
  // CommonError. Within work no rank waits for another that may have failed.
  void run_together(const std::function<void()>& work);

 protected:
  Communicator(std::string name, int rank, std::vector<Member> members, const Patience& patience);

  // What waits asks this now and then.
  bool is_given_up() const;
  // The destructor of an implementation that has ranks to wait for calls this first: what was started needs its
  // members.
  void finish_started();

 private:
  void check_reduce_scatter(const View& mine, const ConstView& all) const;
  void check_all_gather(const View& all, const ConstView& mine) const;
  void check_pair(const ConstView& x, int other, const char* call) const;
  void check_other(int other, const char* call) const;
  void gather_bytes(void* all, const void* mine, std::size_t bytes);
  void broadcast_bytes(void* x, std::size_t bytes, int root);

  virtual void do_all_reduce(View x, Reduce op) = 0;
  virtual void do_reduce_scatter(View mine, const ConstView& all, Reduce op) = 0;
  virtual void do_all_gather(View all, const ConstView& mine) = 0;
  virtual void do_broadcast(View x, int root) = 0;
  virtual void do_send(const ConstView& x, int to) = 0;
  virtual void do_recv(View x, int from) = 0;
  virtual void do_barrier() = 0;
  // In a group of several ranks, of at least one element. Unless an implementation begins them in its own way, they run
  // on the lane of their kind.
  virtual std::unique_ptr<Pending> do_start_all_reduce(View x, Reduce op);
  virtual std::unique_ptr<Pending> do_start_reduce_scatter(View mine, const ConstView& all, Reduce op);
  virtual std::unique_ptr<Pending> do_start_all_gather(View all, const ConstView& mine);
  virtual std::unique_ptr<Pending> do_start_send(const ConstView& x, int to);
  virtual std::unique_ptr<Pending> do_start_recv(View x, int from);
  // Host memory: as all_gather and broadcast, in bytes.
  virtual void do_all_gather_bytes(void* all, const void* mine, std::size_t bytes) = 0;
  virtual void do_broadcast_bytes(void* x, std::size_t bytes, int root) = 0;
  // Host memory: as send and recv, in words. For groups whose Views lie there these are the same.
  virtual void do_send_words(std::span<const std::int32_t> words, int to);
  virtual void do_recv_words(std::span<std::int32_t> words, int from);
  // parents: the ranks of this group that form the new one, in its order; empty when this rank takes part in none, but
  // the call is still made. group: number of the new group among those of this split.
  virtual std::unique_ptr<Communicator> do_split(const std::vector<int>& parents, int group, std::string name) = 0;

  friend class GroupOnDevice;  // hands on to the group that it is made over

  std::string name_;
  int rank_;
  std::vector<Member> members_;
  Patience patience_;
  int exceptions_at_start_;
  Lane collectives_, sends_, receives_;
};

// While it lives, waits in this group last as long as the others live: for what takes some ranks as long as it takes,
// reading, a checkpoint, the export.
class WaitForWork {
 public:
  explicit WaitForWork(Communicator& group) : group_(group), before_(group.patience()) {
    group_.set_patience(before_.while_alive());
  }
  ~WaitForWork() { group_.set_patience(before_); }
  WaitForWork(const WaitForWork&) = delete;
  WaitForWork& operator=(const WaitForWork&) = delete;

 private:
  Communicator& group_;
  Patience before_;
};

// A group of one.
class Alone final : public Communicator {
 public:
  explicit Alone(std::string name = "world", Member member = {});

 private:
  void do_all_reduce(View x, Reduce op) override;
  void do_reduce_scatter(View mine, const ConstView& all, Reduce op) override;
  void do_all_gather(View all, const ConstView& mine) override;
  void do_broadcast(View x, int root) override;
  void do_send(const ConstView& x, int to) override;
  void do_recv(View x, int from) override;
  void do_barrier() override;
  void do_all_gather_bytes(void* all, const void* mine, std::size_t bytes) override;
  void do_broadcast_bytes(void* x, std::size_t bytes, int root) override;
  std::unique_ptr<Communicator> do_split(const std::vector<int>& parents, int group, std::string name) override;
};

}  // namespace distill
