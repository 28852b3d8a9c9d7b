// What the application sees of this folder: groups of ranks over MPI or threads, and the logits channel between two of
// them. See README.md.
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/communicator.h"
#include "core/device.h"
#include "core/train/logits_channel.h"

namespace distill {

// MPI from its start to its end; one per process, first thing in main. Works without mpirun, as a world of one. Groups
// of ranks on one node talk through shared memory, others through messages.
class MpiSession {
 public:
  MpiSession(int& argc, char**& argv);  // begins MPI and nothing else
  // Waits for the other ranks as long as they live, unless this one leaves by an exception: then it ends them.
  ~MpiSession();
  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;

  const Member& me() const;  // this rank; its node is known once there is a world
  int ranks() const;
  // The first call makes it and throws what fails (a CommonError where every rank knows); every rank makes that call.
  Communicator& world();
  // That this run shall end soon. Whoever is asked on a node, all ranks of the node see it. Any thread.
  void ask_to_stop();
  bool stop_asked() const;
  // From now on the loss of another node, silent for dead_after, ends this run with code peer_lost and one message a
  // node, also while no rank waits.
  void watch_nodes(std::chrono::milliseconds dead_after);
  // From now on a rank of this node that is silent for dead_after does so, too: for runs whose ranks wait for each
  // other in ways that this folder does not see, on a GPU.
  void watch_ranks(std::chrono::milliseconds dead_after);
  // A group of all ranks that uses messages even within a node, none longer than longest_message bytes.
  std::unique_ptr<Communicator> messages(std::string name, std::size_t longest_message = std::size_t(1) << 30);
  // Before a rank says that it has lost another: gives those of its node 2 s to call abort_all, since their message is
  // the one that counts. When one has, mpirun ends this process here.
  void await_explanation() const;
  // Ends all ranks now with this exit code; its reason has been printed.
  [[noreturn]] void abort_all(int code);
  static std::string library_version();  // "Open MPI v4.1.4"

 private:
  void make_world();

  struct State;
  std::unique_ptr<State> state_;
};

// Runs body on n ranks that are threads of this process, for debuggers and ThreadSanitizer. Where one throws, the
// others end too and the first error is thrown.
void run_ranks(int n, const std::function<void(Communicator& world)>& body, const Patience& patience = {});

// Ranks of the node of this one, itself included, in their order.
std::vector<int> ranks_of_node(const Communicator& world);

// Read-only bytes in several parts; they live as long as owner.
struct NodeData {
  std::vector<std::span<const std::byte>> parts;
  std::shared_ptr<const void> owner;
};
// One copy per node: the first rank of each node passes what its node shall see, the others' argument is ignored, all
// get it, each part on a 64-byte boundary of memory that they share. On a node of one rank what was passed comes back
// as it is. Every rank of world calls it. Too little shared memory is an input error on all of them.
NodeData share_in_node(Communicator& world, NodeData mine, const std::string& purpose);

// Slots of the ring of a logits channel, one chunk of teacher logits each.
struct ChannelShape {
  std::int64_t positions = 0;  // most positions of a chunk
  std::int64_t columns = 0;    // of the vocabulary shard, or hidden size
  DType dtype = DType::f32;
  int slots = 4;
};

// What travels in a group on GPUs: collectives, or tensors from each rank to the next, or to the one before.
enum class GpuTraffic { collectives, upward, downward };
// NCCL over a group whose ranks have a GPU each. All of them call it. Operations are put on streams of their own,
// ordered with the device's by events, and block no host; small things go through `host`. Maxima and minima need not
// keep NaN. Where this program was built without NCCL, a StagedGroup.
std::unique_ptr<Communicator> make_gpu_group(Device& device, std::unique_ptr<Communicator> host, GpuTraffic traffic);

// Shared memory of a group of ranks of one node: of the world of a run on one node, or of a channel by messages between
// two of them.
std::size_t shared_group_bytes(int ranks);
// That of a channel in shared memory, and what this node has left (the most there can be where it has no limit).
std::size_t channel_bytes(const ChannelShape& shape);
std::uint64_t shared_memory_available();

// The logits channel between two ranks of one node: the teacher's memory is read in place by the student. Both call,
// the student with the teacher's rank in group and the teacher with the student's, with the same shape. Too little
// shared memory is an input error on both.
std::unique_ptr<TeacherSource> open_shared_source(Communicator& group, int teacher, const ChannelShape& shape);
std::unique_ptr<LogitsSink> open_shared_sink(Communicator& group, int student, const ChannelShape& shape);

// The same in the memory of the teacher's GPU: the student's kernels read it in place, and nothing but events orders
// the two streams. Where the student's GPU cannot reach it, both get null and `obstacle` says why.
std::unique_ptr<TeacherSource> open_gpu_source(Communicator& group, int teacher, const ChannelShape& shape,
                                               Device& device, std::string& obstacle);
std::unique_ptr<LogitsSink> open_gpu_sink(Communicator& group, int student, const ChannelShape& shape, Device& device,
                                          std::string& obstacle);

// The same by messages, for partners on different nodes. Both ranks of pair, a group of the two, call; pair is free
// again when the calls return.
std::unique_ptr<TeacherSource> open_message_source(Communicator& pair, int teacher, const ChannelShape& shape);
std::unique_ptr<LogitsSink> open_message_sink(Communicator& pair, int student, const ChannelShape& shape);

}  // namespace distill
