// The logits channel in the teacher's GPU memory. The slots are one allocation of the teacher's device, opened by the
// student through its IPC handle; the words that say how far each side is lie in shared memory, as on a CPU. Handing a
// slot over is an interprocess event recorded on this side's stream before its word is written; taking it over makes
// the other side's stream wait for that event. So neither host waits for a GPU, and no logit is copied.
#include <cuda_runtime_api.h>

#include <cstring>
#include <deque>
#include <exception>
#include <optional>
#include <utility>
#include <vector>

#include "parallel/cuda_calls.h"
#include "parallel/ring.h"
#include "parallel/shared_segment.h"
#include "parallel/shm_channel.h"
#include "parallel/wait.h"

namespace distill {

namespace {

using namespace cuda_calls;

template <class Handle>
std::string bytes_of(const Handle& handle) {
  return {reinterpret_cast<const char*>(&handle), sizeof handle};
}
template <class Handle>
Handle handle_at(const std::string& bytes, std::size_t at) {
  check(at + sizeof(Handle) <= bytes.size(), "the logits channel: a handle is cut off");
  Handle handle;
  std::memcpy(&handle, bytes.data() + at, sizeof handle);
  return handle;
}

// A call between processes that this machine does not allow.
struct Obstacle {
  std::string text;
};
// Which error it gives depends on what is in the way: no peer access, devices hidden from this process, a container.
// With any of them the logits can go another way, unless the error is one of the GPU itself, which stays.
void check_between_processes(cudaError_t result, const char* call) {
  if (result == cudaSuccess) return;
  cudaGetLastError();  // it is dealt with
  if (cudaDeviceSynchronize() != cudaSuccess) check_call(result);
  throw Obstacle{text(call, ": ", cudaGetErrorName(result), " (", cudaGetErrorString(result), ")")};
}

// One a slot; `handles` is for the other process.
std::vector<Event> make_events(int slots, std::string& handles) {
  std::vector<Event> events;
  for (int i = 0; i < slots; ++i) {
    cudaEvent_t event{};
    check_call(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventInterprocess));
    events.emplace_back(event);
    cudaIpcEventHandle_t handle{};
    check_between_processes(cudaIpcGetEventHandle(&handle, event), "cudaIpcGetEventHandle");
    handles += bytes_of(handle);
  }
  return events;
}

std::vector<Event> open_events(int slots, const std::string& bytes, std::size_t at) {
  std::vector<Event> events;
  for (int i = 0; i < slots; ++i, at += sizeof(cudaIpcEventHandle_t)) {
    cudaEvent_t event{};
    check_between_processes(cudaIpcOpenEventHandle(&event, handle_at<cudaIpcEventHandle_t>(bytes, at)),
                            "cudaIpcOpenEventHandle");
    events.emplace_back(event);
  }
  return events;
}

// Another process's memory.
struct CloseHandle {
  void operator()(void* memory) const { cudaIpcCloseMemHandle(memory); }
};
using Opened = std::unique_ptr<void, CloseHandle>;

// How long a stream waits for the other side, measured by events on it: from when the work before was done.
class StreamWaits {
 public:
  explicit StreamWaits(cudaStream_t stream) : stream_(stream) {}

  void begin() {
    collect();
    if (!is_open_) spans_.emplace_back(event(), event());
    is_open_ = true;
    record(spans_.back().first);
  }
  // Nothing where there was no begin().
  void end() {
    if (is_open_) record(spans_.back().second);
    is_open_ = false;
  }
  // Of all waits that are over.
  double seconds() {
    collect();
    return seconds_;
  }

 private:
  Event event() {
    if (free_.empty()) {
      cudaEvent_t made{};
      check_call(cudaEventCreate(&made));
      return Event(made);
    }
    Event last = std::move(free_.back());
    free_.pop_back();
    return last;
  }
  void record(const Event& mark) const { check_call(cudaEventRecord(mark.get(), stream_)); }
  void collect() {
    for (; spans_.size() > std::size_t(is_open_); spans_.pop_front()) {
      auto& [first, last] = spans_.front();
      const cudaError_t done = cudaEventQuery(last.get());
      if (done == cudaErrorNotReady) return;
      check_call(done);
      float milliseconds = 0;
      check_call(cudaEventElapsedTime(&milliseconds, first.get(), last.get()));
      seconds_ += 1e-3 * double(milliseconds);
      free_.push_back(std::move(first));
      free_.push_back(std::move(last));
    }
  }

  cudaStream_t stream_;
  std::deque<std::pair<Event, Event>> spans_;  // the last one is without an end while is_open_
  std::vector<Event> free_;
  bool is_open_ = false;
  double seconds_ = 0;
};

// What one side has of the ring. Either of the memories is set.
struct Parts {
  Buffer own;
  Opened opened;
  std::vector<Event> mine, theirs;  // by slot

  std::byte* memory() const { return static_cast<std::byte*>(own ? own.get() : opened.get()); }
};

class GpuRing final : public Ring, private Awaited {
 public:
  GpuRing(const ChannelEnd& end, Side side, Parts parts, cudaStream_t stream)
      : parts_(std::move(parts)),
        control_(make_control_ring(end, side)),
        self_(end.self),
        other_(end.other),
        patience_(end.patience.while_alive()),
        slot_bytes_(slot_bytes(end.shape)),
        slots_(std::size_t(end.shape.slots)),
        stream_(stream),
        waits_(stream),
        exceptions_at_start_(std::uncaught_exceptions()) {}
  ~GpuRing() override {
    static_cast<void>(cudaStreamSynchronize(stream_));  // what still uses the slots or the events
    // The memory goes when the student has closed it, unless this is no orderly end.
    if (parts_.own && std::uncaught_exceptions() == exceptions_at_start_) try {
        wait_until([this] { return control_->other_closed(); }, patience_, *this);
      } catch (const Error&) {  // it is dead: then it does not read
      }
    parts_ = {};
  }

  std::uint64_t theirs() const override { return control_->theirs(); }
  bool other_closed() const override { return control_->other_closed(); }
  ChunkTag& tag(std::size_t slot) override { return control_->tag(slot); }
  std::byte* memory(std::size_t slot) override { return parts_.memory() + slot * slot_bytes_; }
  void take_over(std::size_t slot) override {
    check_call(cudaStreamWaitEvent(stream_, parts_.theirs[slot].get(), cudaEventWaitDefault));
    waits_.end();
  }
  void begin_wait() override { waits_.begin(); }
  std::optional<double> stream_seconds_waited() override { return waits_.seconds(); }
  void hand_over(std::uint64_t chunks) override {
    check_call(cudaEventRecord(parts_.mine[std::size_t((chunks - 1) % slots_)].get(), stream_));
    control_->hand_over(chunks);
  }
  std::string trouble() override { return control_->trouble(); }

 private:
  std::string self() const override { return name_of(self_); }
  std::string whom() const override { return name_of(other_); }
  std::string purpose() const override { return "closing the logits channel"; }

  Parts parts_;
  std::unique_ptr<Ring> control_;
  Member self_, other_;
  Patience patience_;
  std::size_t slot_bytes_, slots_;
  cudaStream_t stream_;
  StreamWaits waits_;
  int exceptions_at_start_;
};

RingEnd ring_end(const ChannelEnd& end, Side side, Parts parts, Device& device) {
  const auto stream = static_cast<cudaStream_t>(device.native_stream());
  return {std::make_unique<GpuRing>(end, side, std::move(parts), stream), end.shape, end.self, end.other, end.patience};
}

// Payloads: "+" and handles, or "-" and an obstacle.
constexpr char is_possible = '+', is_impossible = '-';
bool says_no(const std::string& payload, std::string& obstacle) {
  check(!payload.empty(), "the logits channel: an empty answer");
  if (payload[0] == is_possible) return false;
  obstacle = payload.substr(1);
  return true;
}
// What body gives for the other side, or the obstacle that it met.
template <class Body>
Answer answer_of(const Body& body) {
  return Answer::of([&] {
    try {
      return is_possible + body();
    } catch (const Obstacle& obstacle) {
      return is_impossible + obstacle.text;
    }
  });
}

}  // namespace

std::unique_ptr<LogitsSink> open_gpu_sink(Communicator& group, int student, const ChannelShape& shape, Device& device,
                                          std::string& obstacle) {
  ChannelEnd end = end_between(group, student, shape);
  std::shared_ptr<SharedSegment> segment;
  Parts parts;
  const Answer offer = answer_of([&] {
    check(shape.positions > 0 && shape.columns > 0 && shape.slots > 0, "the logits channel: ", shape_text(shape));
    parts.own = device.allocate(std::size_t(shape.slots) * slot_bytes(shape));
    cudaIpcMemHandle_t handle{};
    check_between_processes(cudaIpcGetMemHandle(&handle, parts.own.get()), "cudaIpcGetMemHandle");
    std::string handles;
    parts.mine = make_events(shape.slots, handles);
    segment =
        std::make_shared<SharedSegment>(SharedSegment::create(control_bytes(shape), "the words of the logits channel"));
    start_channel(segment->data(), shape);
    end.memory = GroupMemory::Block(segment, segment->data());
    return bytes_of(handle) + handles + segment->name() + '\n' + shape_text(shape);
  });
  group.send(offer.packed(), student);
  offer.check();
  if (says_no(offer.payload, obstacle)) return nullptr;
  const Answer reply = Answer::unpacked(group.recv(student));
  segment->unlink();
  reply.check();
  if (says_no(reply.payload, obstacle)) return nullptr;
  std::unique_ptr<LogitsSink> sink;
  const Answer last = answer_of([&] {
    parts.theirs = open_events(shape.slots, reply.payload, 1);
    sink = make_sink(ring_end(end, Side::teacher, std::move(parts), device));
    return std::string();
  });
  group.send(last.packed(), student);
  last.check();
  if (says_no(last.payload, obstacle)) group.recv(student);  // it has closed the memory, which may go now
  return sink;
}

std::unique_ptr<TeacherSource> open_gpu_source(Communicator& group, int teacher, const ChannelShape& shape,
                                               Device& device, std::string& obstacle) {
  ChannelEnd end = end_between(group, teacher, shape);
  const Answer offer = Answer::unpacked(group.recv(teacher));
  offer.check();
  if (says_no(offer.payload, obstacle)) return nullptr;
  Parts parts;
  const Answer reply = answer_of([&] {
    constexpr std::size_t events_at = 1 + sizeof(cudaIpcMemHandle_t);
    const std::size_t name_at = events_at + std::size_t(shape.slots) * sizeof(cudaIpcEventHandle_t);
    check(offer.payload.size() > name_at, "the logits channel: the two ends disagree on the number of slots");
    const std::size_t shape_at = offer.payload.rfind('\n') + 1;
    const std::string there = offer.payload.substr(shape_at), here = shape_text(shape);
    check(here == there, "the logits channel between ", name_of(end.self), " and ", name_of(end.other), " has ", there,
          " on one side and ", here, " on the other");
    void* memory = nullptr;
    check_between_processes(
        cudaIpcOpenMemHandle(&memory, handle_at<cudaIpcMemHandle_t>(offer.payload, 1), cudaIpcMemLazyEnablePeerAccess),
        "cudaIpcOpenMemHandle");
    parts.opened.reset(memory);
    parts.theirs = open_events(shape.slots, offer.payload, events_at);
    const auto segment = std::make_shared<SharedSegment>(
        SharedSegment::open(offer.payload.substr(name_at, shape_at - 1 - name_at), control_bytes(shape)));
    end.memory = GroupMemory::Block(segment, segment->data());
    std::string handles;
    parts.mine = make_events(shape.slots, handles);
    return handles;
  });
  const bool gave_up = !reply.error && says_no(reply.payload, obstacle);
  if (gave_up) parts = {};  // before the teacher frees the memory
  group.send(reply.packed(), teacher);
  reply.check();
  if (gave_up) return nullptr;
  const Answer last = Answer::unpacked(group.recv(teacher));
  last.check();
  if (says_no(last.payload, obstacle)) {
    parts = {};
    group.send("closed", teacher);
    return nullptr;
  }
  return make_source(ring_end(end, Side::student, std::move(parts), device));
}

}  // namespace distill
