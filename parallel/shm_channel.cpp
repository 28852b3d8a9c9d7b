#include "parallel/shm_channel.h"

#include <atomic>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "parallel/ring.h"
#include "parallel/shared_segment.h"

namespace distill {

namespace {

constexpr std::size_t line = 64, page = 4096;
constexpr std::size_t round_up(std::size_t n, std::size_t unit) { return (n + unit - 1) / unit * unit; }

// What one end tells the other. Each lies in cache lines that only its owner writes.
struct alignas(line) EndState {
  std::atomic<std::uint64_t> chunks;  // published by the teacher, released by the student, since the start
  std::atomic<std::uint32_t> closed;
  LifeSign sign;
};

struct alignas(line) SlotTag : ChunkTag {};

struct alignas(line) Header {
  std::int64_t positions, columns;
  std::int32_t dtype, slots;
  EndState teacher, student;
};

std::size_t tags_offset() { return round_up(sizeof(Header), line); }
std::size_t slots_offset(const ChannelShape& shape) {
  return round_up(tags_offset() + std::size_t(shape.slots) * sizeof(SlotTag), page);
}

class SharedRing final : public Ring {
 public:
  SharedRing(const ChannelEnd& end, Side side)
      : memory_(end.memory),
        slot_bytes_(slot_bytes(end.shape)),
        slots_offset_(slots_offset(end.shape)),
        dead_after_(end.patience.peer_dead_after),
        header_(*std::launder(reinterpret_cast<Header*>(memory_.get()))),
        mine_(side == Side::teacher ? header_.teacher : header_.student),
        other_(side == Side::teacher ? header_.student : header_.teacher) {
    const std::string here = shape_text(end.shape),
                      there = shape_text({header_.positions, header_.columns, DType(header_.dtype), header_.slots});
    check(here == there, "the logits channel between ", name_of(end.self), " and ", name_of(end.other), " has ", there,
          " on one side and ", here, " on the other");
    mine_.sign.sign();
    heart_.emplace(mine_.sign);
  }
  ~SharedRing() override { mine_.closed.store(1, std::memory_order_release); }

  std::uint64_t theirs() const override { return other_.chunks.load(std::memory_order_acquire); }
  bool other_closed() const override { return other_.closed.load(std::memory_order_acquire) != 0; }
  ChunkTag& tag(std::size_t slot) override {
    return std::launder(reinterpret_cast<SlotTag*>(memory_.get() + tags_offset()))[slot];
  }
  std::byte* memory(std::size_t slot) override { return memory_.get() + slots_offset_ + slot * slot_bytes_; }
  void hand_over(std::uint64_t chunks) override { mine_.chunks.store(chunks, std::memory_order_release); }
  std::string trouble() override {
    if (!watch_) {
      if (other_.sign.pid.load(std::memory_order_acquire) == 0) return {};  // on its way
      watch_.emplace(other_.sign);
    }
    return watch_->trouble(dead_after_);
  }

 private:
  GroupMemory::Block memory_;
  std::size_t slot_bytes_, slots_offset_;
  std::chrono::milliseconds dead_after_;
  Header& header_;
  EndState& mine_;
  EndState& other_;
  std::optional<Heart> heart_;
  std::optional<PeerWatch> watch_;
};

RingEnd ring_end(const ChannelEnd& end, Side side) {
  return {std::make_unique<SharedRing>(end, side), end.shape, end.self, end.other, end.patience};
}

}  // namespace

Answer Answer::of(const std::function<std::string()>& work) {
  try {
    return {work(), {}};
  } catch (const Error& error) {
    return {{}, error};
  }
}
std::string Answer::packed() const {
  return error ? text(char(error->code()), error->what()) : text(char(ExitCode::ok), payload);
}
Answer Answer::unpacked(const std::string& packed) {
  const ExitCode code = ExitCode(packed.at(0));
  if (code == ExitCode::ok) return {packed.substr(1), {}};
  return {{}, Error(code, packed.substr(1))};
}
void Answer::check() const {
  if (error) throw Error(*error);
}

ChannelEnd end_between(const Communicator& group, int other, const ChannelShape& shape) {
  check(other >= 0 && other < group.size() && other != group.rank(), "the logits channel: rank ", group.rank(), " of ",
        group.size(), " wants rank ", other);
  ChannelEnd end{nullptr, shape, group.members()[std::size_t(group.rank())], group.members()[std::size_t(other)],
                 group.patience()};
  check(end.self.node == end.other.node, "the logits channel: ", name_of(end.self), " and ", name_of(end.other),
        " are on different nodes");
  return end;
}

std::size_t control_bytes(const ChannelShape& shape) { return slots_offset(shape); }
std::unique_ptr<Ring> make_control_ring(const ChannelEnd& end, Side side) {
  return std::make_unique<SharedRing>(end, side);
}

std::size_t channel_bytes(const ChannelShape& shape) {
  return slots_offset(shape) + std::size_t(shape.slots) * slot_bytes(shape);
}

void start_channel(std::byte* memory, const ChannelShape& shape) {
  Header& header = *new (memory) Header{};
  header.positions = shape.positions;
  header.columns = shape.columns;
  header.dtype = std::int32_t(shape.dtype);
  header.slots = shape.slots;
}

std::unique_ptr<TeacherSource> make_shared_source(const ChannelEnd& end) {
  return make_source(ring_end(end, Side::student));
}
std::unique_ptr<LogitsSink> make_shared_sink(const ChannelEnd& end) { return make_sink(ring_end(end, Side::teacher)); }

std::unique_ptr<LogitsSink> open_shared_sink(Communicator& group, int student, const ChannelShape& shape) {
  ChannelEnd end = end_between(group, student, shape);
  std::shared_ptr<SharedSegment> segment;
  std::unique_ptr<LogitsSink> sink;
  const Answer mine = Answer::of([&] {
    check(shape.positions > 0 && shape.columns > 0 && shape.slots > 0, "the logits channel: ", shape_text(shape));
    segment = std::make_shared<SharedSegment>(SharedSegment::create(
        channel_bytes(shape), text("the logits channel (", shape_text(shape), "; logits_chunk, logits_ring_slots)")));
    start_channel(segment->data(), shape);
    end.memory = GroupMemory::Block(segment, segment->data());
    sink = make_shared_sink(end);
    return segment->name();
  });
  group.send(mine.packed(), student);
  mine.check();
  const Answer theirs = Answer::unpacked(group.recv(student));
  segment->unlink();
  theirs.check();
  return sink;
}

std::unique_ptr<TeacherSource> open_shared_source(Communicator& group, int teacher, const ChannelShape& shape) {
  ChannelEnd end = end_between(group, teacher, shape);
  const Answer theirs = Answer::unpacked(group.recv(teacher));
  theirs.check();
  std::unique_ptr<TeacherSource> source;
  const Answer mine = Answer::of([&] {
    const auto segment = std::make_shared<SharedSegment>(SharedSegment::open(theirs.payload, channel_bytes(shape)));
    end.memory = GroupMemory::Block(segment, segment->data());
    source = make_shared_source(end);
    return std::string();
  });
  group.send(mine.packed(), teacher);
  mine.check();
  return source;
}

}  // namespace distill
