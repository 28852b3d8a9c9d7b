// NCCL's collectives and point-to-point messages between processes and threads, over files in memory that every rank
// opens through /proc. On the stream a collective is: leave the input where all can read it, wait for the others, read
// all of them in the order of ranks. So sums have a fixed order. A send is done when it was received, as with large
// messages on GPUs, so a pair of sends without a group stands still here, too.
#include <fcntl.h>
#include <nccl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

#include "core/number.h"
#include "virtual_gpu/internal.h"

namespace virtual_gpu {
namespace {

constexpr int most_ranks = 64;
constexpr std::size_t box_bytes = 4ull << 30;  // address space of one message; pages are used once touched
constexpr std::size_t outbox_bytes = (1 + most_ranks) * box_bytes;

struct Call {  // what a rank says it does; all must say the same
  int kind, op, type, root;
  std::uint64_t count;
};
struct RankSlot {
  std::atomic<int> pid, outbox, device;
  std::atomic<std::uint64_t> ready, done;  // collectives whose input is there, that were read by this rank
  std::atomic<std::uint64_t> sent[most_ranks], received[most_ranks], bytes[most_ranks];  // messages, by peer
  Call call;
};
struct Shared {
  std::atomic<int> ranks, joined, ready;  // ready: has opened what all others share
  RankSlot slots[most_ranks];
};
struct WireId {
  std::uint64_t magic;
  int pid, fd;
};
constexpr std::uint64_t id_magic = 0x6e63636c00000001;

void* map_file(int fd, std::size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  return memory == MAP_FAILED ? nullptr : memory;
}
int new_file(const char* name, std::size_t bytes) {
  const int fd = memfd_create(name, MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes)) != 0) std::perror("virtual GPU: NCCL"), std::abort();
  return fd;
}
int open_file(int pid, int fd) { return open(join("/proc/", pid, "/fd/", fd).c_str(), O_RDWR | O_CLOEXEC); }

struct Comm {
  Shared* shared = nullptr;
  int rank = 0, ranks = 0, device = 0, outbox = -1;
  std::vector<char*> boxes;                                                          // of every rank
  std::uint64_t collectives = 0, sends[most_ranks] = {}, receives[most_ranks] = {};  // enqueued
  Point last;
  bool aborted = false;
  ncclResult_t error = ncclSuccess;
  int polls = 0;

  RankSlot& mine() { return shared->slots[rank]; }
  RankSlot& slot(int r) { return shared->slots[r]; }
  char* box(int from, int to) {
    return boxes[static_cast<std::size_t>(from)] + static_cast<std::size_t>(to + 1) * box_bytes;
  }
  ~Comm() {
    for (char* box : boxes)
      if (box != nullptr) munmap(box, outbox_bytes);
    if (shared != nullptr) munmap(shared, sizeof *shared);
    if (outbox >= 0) close(outbox);
  }
};

std::map<Comm*, std::shared_ptr<Comm>>& comms() {
  static auto* all = new std::map<Comm*, std::shared_ptr<Comm>>;
  return *all;
}
std::shared_ptr<Comm> comm_of(ncclComm_t handle) {
  const auto found = comms().find(reinterpret_cast<Comm*>(handle));
  if (found != comms().end()) return found->second;
  report("bad communicator", "a call names an NCCL communicator that does not exist or was destroyed");
  return nullptr;
}

// Now and then: is everybody alive? As with the real library the operation stays where it is and the error is asked
// for.
void look_for_the_dead(Comm& c) {
  if (++c.polls % 64 != 0 || c.error != ncclSuccess) return;
  for (int r = 0; r < c.ranks; ++r)
    if (kill(c.slot(r).pid, 0) != 0) c.error = ncclRemoteError;
}

std::size_t size_of_type(int type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8:
      return 1;
    case ncclFloat16:
    case ncclBfloat16:
      return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32:
      return 4;
    default:
      return 8;
  }
}

// --- reductions, rank after rank; each rank on the way hands on what it has in the type that is sent

template <class T, class Wide>
void reduce_as(Comm& c, char* out, std::size_t first, std::size_t count, int op) {
  for (std::size_t i = 0; i < count; ++i) {
    Wide sum{};
    for (int r = 0; r < c.ranks; ++r) {
      const Wide x = static_cast<Wide>(reinterpret_cast<const T*>(c.boxes[static_cast<std::size_t>(r)])[first + i]);
      if (r == 0)
        sum = x;
      else if (op == ncclMax)
        sum = sum < x ? x : sum;
      else if (op == ncclMin)
        sum = x < sum ? x : sum;
      else if (op == ncclProd)
        sum = static_cast<Wide>(static_cast<T>(sum * x));
      else
        sum = static_cast<Wide>(static_cast<T>(sum + x));
    }
    if (op == ncclAvg) sum = static_cast<Wide>(sum / static_cast<Wide>(c.ranks));
    reinterpret_cast<T*>(out)[i] = static_cast<T>(sum);
  }
}

void reduce(Comm& c, char* out, std::size_t first, std::size_t count, int type, int op) {
  switch (type) {
    case ncclInt8:
      return reduce_as<std::int8_t, std::int8_t>(c, out, first, count, op);
    case ncclUint8:
      return reduce_as<std::uint8_t, std::uint8_t>(c, out, first, count, op);
    case ncclInt32:
      return reduce_as<std::int32_t, std::int32_t>(c, out, first, count, op);
    case ncclUint32:
      return reduce_as<std::uint32_t, std::uint32_t>(c, out, first, count, op);
    case ncclInt64:
      return reduce_as<std::int64_t, std::int64_t>(c, out, first, count, op);
    case ncclUint64:
      return reduce_as<std::uint64_t, std::uint64_t>(c, out, first, count, op);
    case ncclFloat16:
      return reduce_as<distill::f16, float>(c, out, first, count, op);
    case ncclBfloat16:
      return reduce_as<distill::bf16, float>(c, out, first, count, op);
    case ncclFloat32:
      return reduce_as<float, float>(c, out, first, count, op);
    default:
      return reduce_as<double, double>(c, out, first, count, op);
  }
}

// --- operations: step() until it says true

enum Kind { all_reduce, reduce_scatter, all_gather, broadcast, send, receive };
constexpr const char* names[] = {"ncclAllReduce", "ncclReduceScatter", "ncclAllGather",
                                 "ncclBroadcast", "ncclSend",          "ncclRecv"};

struct Part {
  std::shared_ptr<Comm> comm;
  Call call;  // root: also the peer of a message
  const char* from = nullptr;
  char* to = nullptr;
  std::uint64_t number = 0;  // which collective, or which message of this pair
  int phase = 0;

  std::size_t element() const { return size_of_type(call.type); }
  std::size_t in_bytes() const {
    const std::size_t n = call.count * element();
    if (call.kind == reduce_scatter) return n * static_cast<std::size_t>(comm->ranks);
    if (call.kind == receive || (call.kind == broadcast && comm->rank != call.root)) return 0;
    return n;
  }
  std::size_t out_bytes() const {
    const std::size_t n = call.count * element();
    return call.kind == send ? 0 : call.kind == all_gather ? n * static_cast<std::size_t>(comm->ranks) : n;
  }
  bool is_collective() const { return call.kind < send; }

  bool step() {
    if (phase < 0 || comm->aborted) return true;
    const bool done = is_collective() ? step_collective() : call.kind == send ? step_send() : step_receive();
    if (done)
      phase = -1;
    else
      look_for_the_dead(*comm);
    return done;
  }

 private:
  bool all_at(std::atomic<std::uint64_t> RankSlot::*counter, std::uint64_t n) const {
    for (int r = 0; r < comm->ranks; ++r)
      if ((comm->slot(r).*counter).load() < n) return false;
    return true;
  }

  bool step_collective() {
    Comm& c = *comm;
    if (phase == 0) {
      if (!all_at(&RankSlot::done, number - 1)) return false;  // somebody still reads what was left there before
      if (in_bytes() > 0) std::memcpy(c.boxes[static_cast<std::size_t>(c.rank)], from, in_bytes());
      c.mine().call = call;
      c.mine().ready.store(number);
      phase = 1;
    }
    if (!all_at(&RankSlot::ready, number)) return false;
    for (int r = 0; r < c.ranks; ++r) {
      const Call& theirs = c.slot(r).call;
      if (std::memcmp(&theirs, &call, sizeof call) == 0) continue;
      if (c.error == ncclSuccess)
        report("collective mismatch", join("rank ", c.rank, " is in ", names[call.kind], " of ", call.count,
                                           " elements, rank ", r, " in ", names[theirs.kind], " of ", theirs.count));
      c.error = ncclInvalidUsage;
      return false;  // as on GPUs: it hangs, and the error can be asked for
    }
    write_output(c);
    c.mine().done.store(number);
    return true;
  }

  void write_output(Comm& c) {
    const std::size_t bytes = call.count * element(), me = static_cast<std::size_t>(c.rank);
    switch (call.kind) {
      case all_reduce:
        return reduce(c, to, 0, call.count, call.type, call.op);
      case reduce_scatter:
        return reduce(c, to, me * call.count, call.count, call.type, call.op);
      case all_gather:
        for (std::size_t r = 0; r < c.boxes.size(); ++r) std::memcpy(to + r * bytes, c.boxes[r], bytes);
        return;
      default:
        std::memcpy(to, c.boxes[static_cast<std::size_t>(call.root)], bytes);
    }
  }

  bool step_send() {
    Comm& c = *comm;
    RankSlot& theirs = c.slot(call.root);
    if (phase == 0) {
      if (theirs.received[c.rank].load() < number - 1) return false;
      std::memcpy(c.box(c.rank, call.root), from, in_bytes());
      c.mine().bytes[call.root].store(in_bytes());
      c.mine().sent[call.root].store(number);
      phase = 1;
    }
    return theirs.received[c.rank].load() >= number;
  }

  bool step_receive() {
    Comm& c = *comm;
    RankSlot& theirs = c.slot(call.root);
    if (theirs.sent[c.rank].load() < number) return false;
    const std::uint64_t bytes = theirs.bytes[c.rank].load();
    if (bytes != out_bytes()) {
      if (c.error == ncclSuccess)
        report("message mismatch",
               join("rank ", c.rank, " receives ", out_bytes(), " bytes, rank ", call.root, " sends ", bytes));
      c.error = ncclInvalidUsage;
      return false;
    }
    std::memcpy(to, c.box(call.root, c.rank), bytes);
    c.mine().received[call.root].store(number);
    return true;
  }
};

// A group: collectives one after the other, messages all at once.
bool step_all(std::vector<Part>& parts) {
  bool all_done = true, collectives_done = true;
  for (Part& part : parts) {
    if (part.is_collective() && !collectives_done) {
      all_done = false;
      continue;
    }
    if (part.step()) continue;
    all_done = false;
    if (part.is_collective()) collectives_done = false;
  }
  return all_done;
}

struct Pending {
  std::shared_ptr<Stream> stream;
  std::vector<Part> parts;
};
thread_local int group_depth = 0;
thread_local std::vector<Pending> group;

void put(const Pending& pending) {
  Comm& comm = *pending.parts.front().comm;
  const auto run = [parts = pending.parts]() mutable {
    for (const Part& p : parts) {
      if (p.phase != 0 || p.comm->aborted) continue;
      if (check_range(names[p.call.kind], p.from, p.in_bytes(), true) &&
          check_range(names[p.call.kind], p.to, p.out_bytes(), true))
        continue;
      state().lost = cudaErrorIllegalAddress;
      return true;
    }
    return step_all(parts);
  };
  enqueue(pending.stream, {"NCCL", run, {comm.last}});
  comm.last = end_of(pending.stream);
}

template <class Body>
ncclResult_t nccl_call(const char* name, const Body& body) {
  Held held(lock);
  if (const int planned = planned_failure(name)) return static_cast<ncclResult_t>(planned);
  if (state().lost != cudaSuccess) return ncclUnhandledCudaError;
  return body(held);
}

ncclResult_t operation(Call call, const void* from, void* to, ncclComm_t handle, cudaStream_t stream_handle) {
  return nccl_call(names[call.kind], [&](Held&) {
    const auto comm = comm_of(handle);
    const auto stream = comm == nullptr ? nullptr : stream_of(stream_handle);
    if (stream == nullptr || stream->device != comm->device || call.root < 0 || call.root >= comm->ranks)
      return ncclInvalidArgument;
    if (comm->error != ncclSuccess) return comm->error;
    Part part{comm, call, static_cast<const char*>(from), static_cast<char*>(to)};
    if (part.in_bytes() > box_bytes || !check_range(names[call.kind], from, part.in_bytes(), false) ||
        !check_range(names[call.kind], to, part.out_bytes(), false))
      return ncclInvalidArgument;
    part.number = part.is_collective() ? ++comm->collectives
                  : call.kind == send  ? ++comm->sends[call.root]
                                       : ++comm->receives[call.root];
    for (Pending& p : group)
      if (p.stream == stream && p.parts.front().comm == comm) {
        p.parts.push_back(part);
        return ncclSuccess;
      }
    group.push_back({stream, {part}});
    if (group_depth == 0) put(std::exchange(group, {}).front());
    return ncclSuccess;
  });
}

// Joins the ranks; the lock is not held while others are waited for.
ncclResult_t join_ranks(Held& held, Comm& c, const WireId& id) {
  const int fd = open_file(id.pid, id.fd);
  if (fd < 0) return ncclSystemError;
  c.shared = static_cast<Shared*>(map_file(fd, sizeof(Shared)));
  close(fd);
  if (c.shared == nullptr) return ncclSystemError;
  int expected = 0;
  if (!c.shared->ranks.compare_exchange_strong(expected, c.ranks) && expected != c.ranks) return ncclInvalidArgument;
  c.outbox = new_file("virtual_gpu_nccl", outbox_bytes);
  c.mine().pid = getpid();
  c.mine().outbox = c.outbox;
  c.mine().device = state().visible[static_cast<std::size_t>(c.device)];
  ++c.shared->joined;
  const auto wait_for_all = [&](const std::atomic<int>& count) {
    for (int waited = 0; count < c.ranks; ++waited) {
      if (kill(id.pid, 0) != 0 || waited > 60000) return false;
      held.unlock();
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      held.lock();
    }
    return true;
  };
  if (!wait_for_all(c.shared->joined)) return ncclSystemError;
  for (int r = 0; r < c.ranks; ++r)
    for (int other = 0; other < r; ++other)
      if (c.slot(r).device == c.slot(other).device) {
        report("duplicate device",
               join("ranks ", other, " and ", r, " of one NCCL communicator use device ", c.slot(r).device.load()));
        return ncclInvalidUsage;
      }
  for (int r = 0; r < c.ranks; ++r) {
    const int outbox = open_file(c.slot(r).pid, c.slot(r).outbox);
    c.boxes.push_back(outbox < 0 ? nullptr : static_cast<char*>(map_file(outbox, outbox_bytes)));
    if (outbox >= 0) close(outbox);
    if (c.boxes.back() == nullptr) return ncclSystemError;
  }
  ++c.shared->ready;
  return wait_for_all(c.shared->ready) ? ncclSuccess : ncclSystemError;
}

ncclResult_t remove(ncclComm_t handle) {
  comms().erase(reinterpret_cast<Comm*>(handle));
  --state().handles["NCCL communicators"];
  return ncclSuccess;
}

}  // namespace
}  // namespace virtual_gpu

using namespace virtual_gpu;

ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t result) {
  switch (result) {
    case ncclSuccess:
      return "no error";
    case ncclUnhandledCudaError:
      return "unhandled cuda error";
    case ncclSystemError:
      return "unhandled system error";
    case ncclInternalError:
      return "internal error";
    case ncclInvalidArgument:
      return "invalid argument";
    case ncclInvalidUsage:
      return "invalid usage";
    case ncclRemoteError:
      return "remote process exited or there was a network error";
    case ncclInProgress:
      return "NCCL operation in progress";
    default:
      return "unknown result code";
  }
}
const char* ncclGetLastError(ncclComm_t) { return ""; }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  return nccl_call("ncclGetUniqueId", [&](Held&) {
    const WireId wire{id_magic, getpid(), new_file("virtual_gpu_nccl_id", sizeof(Shared))};
    *id = {};
    std::memcpy(id, &wire, sizeof wire);
    return ncclSuccess;
  });
}
ncclResult_t ncclCommInitRank(ncclComm_t* handle, int ranks, ncclUniqueId id, int rank) {
  return nccl_call("ncclCommInitRank", [&](Held& held) {
    WireId wire;
    std::memcpy(&wire, &id, sizeof wire);
    if (wire.magic != id_magic || ranks < 1 || ranks > most_ranks || rank < 0 || rank >= ranks)
      return ncclInvalidArgument;
    const auto comm = std::make_shared<Comm>();
    comm->rank = rank;
    comm->ranks = ranks;
    comm->device = current_device;
    const ncclResult_t result = join_ranks(held, *comm, wire);
    if (result != ncclSuccess) return result;
    comms()[comm.get()] = comm;
    ++state().handles["NCCL communicators"];
    *handle = reinterpret_cast<ncclComm_t>(comm.get());
    need_background();
    return ncclSuccess;
  });
}
ncclResult_t ncclCommDestroy(ncclComm_t handle) {
  return nccl_call("ncclCommDestroy", [&](Held& held) {
    const auto comm = comm_of(handle);
    if (comm == nullptr) return ncclInvalidArgument;
    wait_for(held, {comm->last});
    return remove(handle);
  });
}
// Works in every state: what was begun ends at once, without a result.
ncclResult_t ncclCommAbort(ncclComm_t handle) {
  const Held held(lock);
  if (const int planned = planned_failure("ncclCommAbort")) return static_cast<ncclResult_t>(planned);
  const auto comm = comm_of(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  comm->aborted = true;
  changed.notify_all();
  return remove(handle);
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t handle, ncclResult_t* error) {
  const Held held(lock);
  if (const int planned = planned_failure("ncclCommGetAsyncError")) {
    *error = static_cast<ncclResult_t>(planned);  // a failure that the library reports this way
    return ncclSuccess;
  }
  const auto comm = comm_of(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  *error = state().lost != cudaSuccess ? ncclUnhandledCudaError : comm->error;
  return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
  return nccl_call("ncclGroupStart", [&](Held&) {
    ++group_depth;
    return ncclSuccess;
  });
}
ncclResult_t ncclGroupEnd() {
  return nccl_call("ncclGroupEnd", [&](Held&) {
    if (group_depth == 0) return ncclInvalidUsage;
    if (--group_depth == 0)
      for (const Pending& pending : std::exchange(group, {})) put(pending);
    return ncclSuccess;
  });
}

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
  return operation({all_reduce, op, type, 0, count}, from, to, comm, stream);
}
ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream) {
  return operation({reduce_scatter, op, type, 0, count}, from, to, comm, stream);
}
ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  return operation({all_gather, 0, type, 0, count}, from, to, comm, stream);
}
ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  return operation({broadcast, 0, type, root, count}, from, to, comm, stream);
}
ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return operation({send, 0, type, peer, count}, from, nullptr, comm, stream);
}
ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  return operation({receive, 0, type, peer, count}, nullptr, to, comm, stream);
}
