// Groups of ranks with a GPU each, over NCCL. What a call begins waits on a stream of its own for the device's work so
// far; waiting for it makes the device's stream wait. The host is blocked by neither. Each direction between two ranks
// has a communicator of its own, so that what is received never waits behind what is sent; all are connected when the
// group is made (NCCL_RUNTIME_CONNECT=0, and a greeting), because what connects first blocks the host until the other
// side comes, too.
//
// Nothing is begun that waits for work which this rank has not yet put on its stream: loading a kernel at its first
// launch, or allocating memory, may wait for all that the GPU has to do, and so for ever.
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <utility>
#include <vector>

#include "core/group_on_device.h"
#include "parallel/cuda_calls.h"
#include "parallel/parallel.h"

namespace distill {

namespace {

using namespace cuda_calls;

void check_nccl(ncclResult_t result, const char* call) {
  if (result == ncclSuccess) return;
  const std::string more = ncclGetLastError(nullptr);
  fail(call, ": ", ncclGetErrorString(result), more.empty() ? "" : " (" + more + ")");
}

ncclDataType_t nccl_type(DType type) {
  switch (type) {
    case DType::f32:
      return ncclFloat32;
    case DType::bf16:
      return ncclBfloat16;
    case DType::f16:
      return ncclFloat16;
    case DType::f64:
      return ncclFloat64;
    case DType::i32:
      return ncclInt32;
  }
  fail("NCCL has no type ", name_of(type));
}

ncclRedOp_t nccl_op(Reduce op) { return op == Reduce::sum ? ncclSum : op == Reduce::max ? ncclMax : ncclMin; }

// What a query says; anything but done and not yet done is an error.
bool check_done(cudaError_t state) {
  if (state != cudaErrorNotReady) check_call(state);
  cudaGetLastError();  // not ready is no error
  return state == cudaSuccess;
}

// An NCCL communicator and the stream that its operations run on.
class Way {
 public:
  Way(const std::string& id, int rank, int ranks) {
    ncclUniqueId unique{};
    check(id.size() == sizeof unique, "an NCCL id of ", id.size(), " bytes");
    std::memcpy(&unique, id.data(), sizeof unique);
    ncclComm_t comm = nullptr;
    check_nccl(ncclCommInitRank(&comm, ranks, unique, rank), "ncclCommInitRank");
    comm_ = comm;
    stream_ = new_stream();
  }
  Way(Way&& other) noexcept
      : comm_(other.comm_.exchange(nullptr)),
        stream_(std::exchange(other.stream_, nullptr)),
        start_(std::move(other.start_)) {}
  ~Way() {
    if (std::uncaught_exceptions() > exceptions_at_start_) abort();  // while the group is made
    if (comm_) ncclCommDestroy(comm_);
    if (stream_) cudaStreamDestroy(stream_);
  }
  // Ends what is under way, for which ncclCommDestroy would wait, and nothing more begins. Any thread.
  void abort() {
    if (const ncclComm_t comm = comm_.exchange(nullptr)) ncclCommAbort(comm);
  }
  ncclComm_t comm() const { return comm_; }
  cudaStream_t stream() const { return stream_; }
  // What this rank itself has to do before the operation that was begun last.
  cudaEvent_t start() const { return start_.get(); }
  // Nothing is left to wait for but the other ranks.
  bool waits_for_others() const { return check_done(cudaEventQuery(start())) && !check_done(cudaStreamQuery(stream_)); }

 private:
  std::atomic<ncclComm_t> comm_ = nullptr;
  cudaStream_t stream_ = nullptr;
  Event start_{new_event()};
  int exceptions_at_start_ = std::uncaught_exceptions();
};

// What the device asks while the host waits for it.
class Watching {
 public:
  Watching(Device& device, Device::Watch watch) : device_(device) { device_.add_watch(this, std::move(watch)); }
  ~Watching() { device_.remove_watch(this); }
  Watching(const Watching&) = delete;

 private:
  Device& device_;
};

std::string new_id() {
  ncclUniqueId id{};
  check_nccl(ncclGetUniqueId(&id), "ncclGetUniqueId");
  return {reinterpret_cast<const char*>(&id), sizeof id};
}

// Events that were recorded and waited for, to be recorded again.
using Events = std::vector<Event>;

class NcclGroup final : public GroupOnDevice {
 public:
  NcclGroup(Device& device, std::unique_ptr<Communicator> host_group, GpuTraffic traffic)
      : GroupOnDevice(device, std::move(host_group)),
        compute_(static_cast<cudaStream_t>(device.native_stream())),
        traffic_(traffic) {
    setenv("NCCL_RUNTIME_CONNECT", "0", 0);  // connect when a communicator is made, for every kind of operation
    if (traffic == GpuTraffic::collectives) {
      const std::string id = host().broadcast(rank() == 0 ? new_id() : "", 0);
      collectives_.emplace_back(id, rank(), size());
    } else {
      connect_neighbours();
    }
    greet();
  }
  ~NcclGroup() override {
    // An error that passes may be the end of the other ranks: what waits for them is given up.
    if (std::uncaught_exceptions() > exceptions_at_start_)
      for_all_ways([](Way& way) { way.abort(); });
    else
      static_cast<void>(cudaStreamSynchronize(compute_));  // it may still wait for events of this group
  }
  void give_up() override {
    GroupOnDevice::give_up();
    for_all_ways([](Way& way) { way.abort(); });
  }

 private:
  // What was begun, done when its event is.
  class Begun final : public Pending {
   public:
    Begun(NcclGroup& group, Event done) : group_(group), done_(std::move(done)) {}
    ~Begun() override {
      // Where an error passes the device does nothing more.
      if (!is_over_ && std::uncaught_exceptions() == exceptions_at_start_)
        static_cast<void>(cudaStreamWaitEvent(group_.compute_, done_.get(), cudaEventWaitDefault));
      group_.free_events_.push_back(std::move(done_));
    }
    void wait() override {
      if (is_over_) return;
      is_over_ = true;
      group_.check_alive();
      check_call(cudaStreamWaitEvent(group_.compute_, done_.get(), cudaEventWaitDefault));
    }
    bool is_done() const override { return cudaEventQuery(done_.get()) != cudaErrorNotReady; }

   private:
    NcclGroup& group_;
    Event done_;
    bool is_over_ = false;
    int exceptions_at_start_ = std::uncaught_exceptions();
  };

  // Who sends to whom: ranks r and r + 1. The sender is rank 0 of the two.
  void connect_neighbours() {
    for (int lower = rank() - 1; lower <= rank(); ++lower) {
      if (lower < 0 || lower + 1 >= size()) continue;
      const bool sends = (lower == rank()) == (traffic_ == GpuTraffic::upward);
      const int other = lower == rank() ? rank() + 1 : rank() - 1;
      std::string id;
      if (sends)
        host().send(id = new_id(), other);
      else
        id = host().recv(other);
      (sends ? to_ : from_).emplace(other, Way(id, sends ? 0 : 1, 2));
    }
  }

  // One number goes every way, so that all are connected.
  void greet() {
    Tensor word = device().tensor(1, 1, DType::f32);
    device().zero(word.view());
    try {
      if (!collectives_.empty()) do_all_reduce(word.view(), Reduce::sum);
      const int first = traffic_ == GpuTraffic::upward ? 0 : size() - 1;
      if (rank() != first)
        for (const auto& [other, _] : from_) do_recv(word.view(), other);
      for (const auto& [other, _] : to_) do_send(word.view(), other);
      device().synchronize();
    } catch (...) {
      for_all_ways([](Way& way) { way.abort(); });  // before the word goes, which waits for them
      throw;
    }
  }

  Event event() {
    if (free_events_.empty()) return Event(new_event());
    Event last = std::move(free_events_.back());
    free_events_.pop_back();
    return last;
  }

  // Puts operation(comm, stream) behind the device's work so far.
  template <class Operation>
  std::unique_ptr<Pending> begin(const Way& way, const char* call, const Operation& operation) {
    check_alive();
    check_call(cudaEventRecord(way.start(), compute_));
    check_call(cudaStreamWaitEvent(way.stream(), way.start(), cudaEventWaitDefault));
    check_nccl(operation(way.comm(), way.stream()), call);
    Event done = event();
    check_call(cudaEventRecord(done.get(), way.stream()));
    return std::make_unique<Begun>(*this, std::move(done));
  }

  template <class Use>
  void for_all_ways(const Use& use) {
    for (Way& way : collectives_) use(way);
    for (auto* ways : {&to_, &from_})
      for (auto& [_, way] : *ways) use(way);
  }

  // NCCL says here, and not where an operation was begun, that another rank is gone.
  void check_alive() {
    check(!is_given_up(), name(), ": was given up");
    for_all_ways([&](const Way& way) {
      ncclResult_t error = ncclSuccess;
      check_nccl(ncclCommGetAsyncError(way.comm(), &error), "ncclCommGetAsyncError");
      if (error == ncclSuccess || error == ncclInProgress) return;
      const std::string problem = text(name(), ": NCCL: ", ncclGetErrorString(error));
      if (error == ncclRemoteError) throw Error(ExitCode::peer_lost, problem);
      fail(problem);
    });
  }

  // The host has waited this long for its GPU, perhaps for an operation of this group.
  void look(std::chrono::milliseconds waited) {
    if (is_given_up()) return;
    check_alive();
    bool waits = false;
    for_all_ways([&](const Way& way) { waits |= way.waits_for_others(); });
    if (!waits) return;
    const std::string who = text(name_of(members()[std::size_t(rank())]), " has waited ", double(waited.count()) / 1000,
                                 " s on its GPU for the other ranks of ", name());
    if (waited >= patience().peer_timeout)
      throw Error(ExitCode::peer_lost, who + ": they live but give nothing (peer_timeout)");
    if (waited < patience().stall_report) {
      is_stall_reported_ = false;
    } else if (!std::exchange(is_stall_reported_, true)) {
      patience().say(who + " and goes on waiting");
    }
  }

  const Way& collective_way() const {
    check(!collectives_.empty(), name(), ": made for messages between neighbours, not for collectives");
    return collectives_.front();
  }
  const Way& way_between(const std::map<int, Way>& ways, int other) const {
    const auto found = ways.find(other);
    check(found != ways.end(), name(), ": rank ", rank(), " has no way to or from rank ", other);
    return found->second;
  }

  std::unique_ptr<Pending> do_start_all_reduce(View x, Reduce op) override {
    return begin(collective_way(), "ncclAllReduce", [&](ncclComm_t comm, cudaStream_t stream) {
      return ncclAllReduce(x.data, x.mutable_data(), std::size_t(x.size()), nccl_type(x.dtype), nccl_op(op), comm,
                           stream);
    });
  }
  std::unique_ptr<Pending> do_start_reduce_scatter(View mine, const ConstView& all, Reduce op) override {
    return begin(collective_way(), "ncclReduceScatter", [&](ncclComm_t comm, cudaStream_t stream) {
      return ncclReduceScatter(all.data, mine.mutable_data(), std::size_t(mine.size()), nccl_type(all.dtype),
                               nccl_op(op), comm, stream);
    });
  }
  std::unique_ptr<Pending> do_start_all_gather(View all, const ConstView& mine) override {
    return begin(collective_way(), "ncclAllGather", [&](ncclComm_t comm, cudaStream_t stream) {
      return ncclAllGather(mine.data, all.mutable_data(), std::size_t(mine.size()), nccl_type(all.dtype), comm, stream);
    });
  }
  std::unique_ptr<Pending> do_start_send(const ConstView& x, int to) override {
    return begin(way_between(to_, to), "ncclSend", [&](ncclComm_t comm, cudaStream_t stream) {
      return ncclSend(x.data, std::size_t(x.size()), nccl_type(x.dtype), /*peer=*/1, comm, stream);
    });
  }
  std::unique_ptr<Pending> do_start_recv(View x, int from) override {
    return begin(way_between(from_, from), "ncclRecv", [&](ncclComm_t comm, cudaStream_t stream) {
      return ncclRecv(x.mutable_data(), std::size_t(x.size()), nccl_type(x.dtype), /*peer=*/0, comm, stream);
    });
  }

  void do_all_reduce(View x, Reduce op) override { do_start_all_reduce(x, op)->wait(); }
  void do_reduce_scatter(View mine, const ConstView& all, Reduce op) override {
    do_start_reduce_scatter(mine, all, op)->wait();
  }
  void do_all_gather(View all, const ConstView& mine) override { do_start_all_gather(all, mine)->wait(); }
  void do_broadcast(View x, int root) override {
    begin(collective_way(), "ncclBroadcast", [&](ncclComm_t comm, cudaStream_t stream) {
      return ncclBroadcast(x.data, x.mutable_data(), std::size_t(x.size()), nccl_type(x.dtype), root, comm, stream);
    })->wait();
  }
  void do_send(const ConstView& x, int to) override { do_start_send(x, to)->wait(); }
  void do_recv(View x, int from) override { do_start_recv(x, from)->wait(); }

  cudaStream_t compute_;
  GpuTraffic traffic_;
  std::vector<Way> collectives_;  // one, or none
  std::map<int, Way> to_, from_;  // by the other rank
  Events free_events_;
  bool is_stall_reported_ = false;  // of the present wait
  int exceptions_at_start_ = std::uncaught_exceptions();
  Watching watching_{device(), [this](std::chrono::milliseconds waited) { look(waited); }};
};

}  // namespace

std::unique_ptr<Communicator> make_gpu_group(Device& device, std::unique_ptr<Communicator> host, GpuTraffic traffic) {
  check(host->size() > 1, host->name(), ": a group of one needs no NCCL");
  return std::make_unique<NcclGroup>(device, std::move(host), traffic);
}

}  // namespace distill
