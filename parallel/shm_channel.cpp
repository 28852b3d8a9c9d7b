#include "parallel/shm_channel.h"

#include <atomic>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "core/train/micro_batch.h"
#include "parallel/shared_segment.h"
#include "parallel/wait.h"

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

// What a slot holds; written by the teacher before it publishes.
struct alignas(line) SlotTag {
  std::uint64_t sequence;    // of the chunk, since the start
  std::uint64_t batch;       // micro-batches since the start
  std::uint64_t batch_hash;  // of what the micro-batch supervises
  std::uint64_t chunk;       // within the micro-batch
  std::int64_t positions;
};

struct alignas(line) Header {
  std::int64_t positions, columns;
  std::int32_t dtype, slots;
  EndState teacher, student;
};

std::size_t slot_bytes(const ChannelShape& shape) {
  return round_up(std::size_t(shape.positions * shape.columns) * size_of(shape.dtype), page);
}
std::size_t tags_offset() { return round_up(sizeof(Header), line); }
std::size_t slots_offset(const ChannelShape& shape) {
  return round_up(tags_offset() + std::size_t(shape.slots) * sizeof(SlotTag), page);
}

std::string shape_text(const ChannelShape& shape) {
  return text(shape.slots, " slots of ", shape.positions, " positions x ", shape.columns, " ", name_of(shape.dtype));
}

// FNV-1a. Both ends must see the same micro-batch; its labels and their rows tell two apart.
std::uint64_t hash_of(const MicroBatch& batch) {
  std::uint64_t hash = 0xcbf29ce484222325ull;
  for (const std::vector<std::int32_t>* values : {&batch.supervised, &batch.labels})
    for (const std::int32_t value : *values) hash = (hash ^ std::uint32_t(value)) * 0x100000001b3ull;
  return hash;
}

// What both ends have in common: who they are, where the micro-batch stands, and waiting for the other.
class End : private Awaited {
 public:
  enum class Side { student, teacher };

  End(ChannelEnd end, Side side)
      : end_(std::move(end)),
        side_(side),
        header_(*std::launder(reinterpret_cast<Header*>(end_.memory.get()))),
        mine_(side == Side::teacher ? header_.teacher : header_.student),
        other_(side == Side::teacher ? header_.student : header_.teacher) {
    const ChannelShape there{header_.positions, header_.columns, DType(header_.dtype), header_.slots};
    check(there.positions == shape().positions && there.columns == shape().columns && there.dtype == shape().dtype &&
              there.slots == shape().slots,
          "the logits channel between ", name_of(end_.self), " and ", name_of(end_.other), " has ", shape_text(there),
          " on one side and ", shape_text(shape()), " on the other");
    mine_.sign.sign();
    heart_.emplace(mine_.sign);
  }
  ~End() override { mine_.closed.store(1, std::memory_order_release); }
  End(const End&) = delete;
  End& operator=(const End&) = delete;

  void begin(const MicroBatch& batch) {
    check(!held_, "the logits channel: a micro-batch begins while a chunk is held");
    due_.batch++;
    due_.batch_hash = hash_of(batch);
    due_.chunk = 0;
  }
  double seconds_waited() const { return seconds_; }
  std::int64_t bytes_moved() const { return bytes_; }

 protected:
  const ChannelShape& shape() const { return end_.shape; }
  std::uint64_t theirs() const { return other_.chunks.load(std::memory_order_acquire); }
  bool other_closed() const { return other_.closed.load(std::memory_order_acquire) != 0; }
  SlotTag& tag() const { return std::launder(reinterpret_cast<SlotTag*>(end_.memory.get() + tags_offset()))[slot()]; }
  View slot_view() const {
    return {end_.memory.get() + slots_offset(shape()) + slot() * slot_bytes(shape()), due_.positions, shape().columns,
            shape().dtype};
  }

  void hold(std::int64_t positions) {
    check(!held_ && due_.batch > 0 && positions > 0 && positions <= shape().positions,
          "the logits channel: a chunk of ", positions, " of at most ", shape().positions, " positions is asked for",
          held_ ? " while another is held" : "", due_.batch == 0 ? " before any micro-batch" : "");
    held_ = true;
    due_.positions = positions;
  }
  template <class Ready>
  void wait(const Ready& ready) {
    seconds_ += wait_until(ready, end_.patience, *this);
  }
  void hand_over() {
    check(held_, "the logits channel: a chunk is handed over that is not held");
    held_ = false;
    bytes_ += due_.positions * shape().columns * std::int64_t(size_of(shape().dtype));
    ++due_.sequence;
    ++due_.chunk;
    mine_.chunks.store(due_.sequence, std::memory_order_release);
  }

  std::string self() const override { return name_of(end_.self); }
  std::string whom() const override { return name_of(end_.other); }
  std::string purpose() const override {
    return text("the logits channel (", side_ == Side::teacher ? "a free slot for " : "", "chunk ", due_.chunk,
                " of micro-batch ", due_.batch, ")");
  }

  SlotTag due_{};  // what comes next, or is held; micro-batches count from 1
  bool held_ = false;

 private:
  std::string trouble() override {
    if (!watch_) {
      if (other_.sign.pid.load(std::memory_order_acquire) == 0) return {};  // on its way
      watch_.emplace(other_.sign);
    }
    return watch_->trouble(end_.patience.peer_dead_after);
  }
  std::size_t slot() const { return std::size_t(due_.sequence % std::uint64_t(shape().slots)); }

  ChannelEnd end_;
  Side side_;
  Header& header_;
  EndState& mine_;
  EndState& other_;
  std::optional<Heart> heart_;
  std::optional<PeerWatch> watch_;
  double seconds_ = 0;
  std::int64_t bytes_ = 0;
};

class SharedSource final : public TeacherSource, private End {
 public:
  explicit SharedSource(ChannelEnd end) : End(std::move(end), Side::student) {}
  void begin(const MicroBatch& batch) override { End::begin(batch); }
  ConstView acquire(std::int64_t positions) override {
    hold(positions);
    wait([this] { return theirs() > due_.sequence || other_closed(); });
    if (theirs() <= due_.sequence)
      throw Error(ExitCode::peer_lost, text(whom(), " has closed its end; ", self(), " still needs ", purpose()));
    check_tag(tag());
    return slot_view();
  }
  void release() override { hand_over(); }
  double seconds_waited() const override { return End::seconds_waited(); }
  std::int64_t bytes_moved() const override { return End::bytes_moved(); }

 private:
  void check_tag(const SlotTag& found) const {
    check(found.sequence == due_.sequence, "the logits channel from ", whom(), " to ", self(),
          ": a slot holds chunk number ", found.sequence, " where ", due_.sequence, " is due");
    const bool is_same = found.batch == due_.batch && found.chunk == due_.chunk && found.positions == due_.positions;
    check(is_same, "the logits channel: ", whom(), " sent chunk ", found.chunk, " of micro-batch ", found.batch,
          " with ", found.positions, " positions where ", self(), " is at chunk ", due_.chunk, " of micro-batch ",
          due_.batch, " with ", due_.positions, ": the two read different data or cut it differently");
    check(found.batch_hash == due_.batch_hash, "the logits channel: ", whom(), " and ", self(),
          " supervise different tokens in micro-batch ", due_.batch, ": the two read different data");
  }
};

class SharedSink final : public LogitsSink, private End {
 public:
  explicit SharedSink(ChannelEnd end) : End(std::move(end), Side::teacher) {}
  void begin(const MicroBatch& batch) override { End::begin(batch); }
  View acquire(std::int64_t positions) override {
    if (other_closed()) return {};
    hold(positions);
    const std::uint64_t slots = std::uint64_t(shape().slots);
    wait([&] { return due_.sequence - theirs() < slots || other_closed(); });
    if (!other_closed()) return slot_view();
    held_ = false;
    return {};
  }
  void publish() override {
    tag() = due_;
    hand_over();
  }
  double seconds_waited() const override { return End::seconds_waited(); }
};

// Text between two ranks.
void send_text(Communicator& group, int to, const std::string& message) {
  std::int32_t length = std::int32_t(message.size());
  std::vector<std::int32_t> words((message.size() + 3) / 4);
  std::copy(message.begin(), message.end(), reinterpret_cast<char*>(words.data()));
  group.send({&length, 1, 1, 1, DType::i32}, to);
  group.send({words.data(), 1, std::int64_t(words.size()), std::int64_t(words.size()), DType::i32}, to);
}
std::string recv_text(Communicator& group, int from) {
  std::int32_t length = 0;
  group.recv({&length, 1, 1, DType::i32}, from);
  std::vector<std::int32_t> words((std::size_t(length) + 3) / 4);
  group.recv({words.data(), 1, std::int64_t(words.size()), DType::i32}, from);
  return {reinterpret_cast<const char*>(words.data()), std::size_t(length)};
}

// What a rank answers while the channel is opened: a payload, or the error that it met, which both throw.
struct Answer {
  std::string payload;
  std::optional<Error> error;

  static Answer of(const std::function<std::string()>& work) {
    try {
      return {work(), {}};
    } catch (const Error& error) {
      return {{}, error};
    }
  }
  std::string packed() const {
    return error ? text(char(error->code()), error->what()) : text(char(ExitCode::ok), payload);
  }
  static Answer unpacked(const std::string& packed) {
    const ExitCode code = ExitCode(packed.at(0));
    if (code == ExitCode::ok) return {packed.substr(1), {}};
    return {{}, Error(code, packed.substr(1))};
  }
  void check() const {
    if (error) throw Error(*error);
  }
};

ChannelEnd end_between(const Communicator& group, int other, const ChannelShape& shape) {
  check(other >= 0 && other < group.size() && other != group.rank(), "the logits channel: rank ", group.rank(), " of ",
        group.size(), " wants rank ", other);
  ChannelEnd end{nullptr, shape, group.members()[std::size_t(group.rank())], group.members()[std::size_t(other)],
                 group.patience()};
  check(end.self.node == end.other.node, "the logits channel: ", name_of(end.self), " and ", name_of(end.other),
        " are on different nodes");
  return end;
}

}  // namespace

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

std::unique_ptr<TeacherSource> make_shared_source(ChannelEnd end) {
  return std::make_unique<SharedSource>(std::move(end));
}
std::unique_ptr<LogitsSink> make_shared_sink(ChannelEnd end) { return std::make_unique<SharedSink>(std::move(end)); }

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
  send_text(group, student, mine.packed());
  mine.check();
  const Answer theirs = Answer::unpacked(recv_text(group, student));
  segment->unlink();
  theirs.check();
  return sink;
}

std::unique_ptr<TeacherSource> open_shared_source(Communicator& group, int teacher, const ChannelShape& shape) {
  ChannelEnd end = end_between(group, teacher, shape);
  const Answer theirs = Answer::unpacked(recv_text(group, teacher));
  theirs.check();
  std::unique_ptr<TeacherSource> source;
  const Answer mine = Answer::of([&] {
    const auto segment = std::make_shared<SharedSegment>(SharedSegment::open(theirs.payload, channel_bytes(shape)));
    end.memory = GroupMemory::Block(segment, segment->data());
    source = make_shared_source(end);
    return std::string();
  });
  send_text(group, teacher, mine.packed());
  mine.check();
  return source;
}

}  // namespace distill
