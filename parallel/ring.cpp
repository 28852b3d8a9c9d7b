#include "parallel/ring.h"

#include <utility>
#include <vector>

#include "core/train/micro_batch.h"
#include "parallel/wait.h"

namespace distill {

namespace {

// FNV-1a. Both ends must see the same micro-batch; its labels and their rows tell two apart.
std::uint64_t hash_of(const MicroBatch& batch) {
  std::uint64_t hash = 0xcbf29ce484222325ull;
  for (const std::vector<std::int32_t>* values : {&batch.supervised, &batch.labels})
    for (const std::int32_t value : *values) hash = (hash ^ std::uint32_t(value)) * 0x100000001b3ull;
  return hash;
}

// What both ends have in common: where the micro-batch stands, and waiting for the other.
class End : private Awaited {
 public:
  End(RingEnd end, Side side) : end_(std::move(end)), side_(side) {}
  End(const End&) = delete;
  End& operator=(const End&) = delete;

  void begin(const MicroBatch& batch) {
    check(!held_, "the logits channel: a micro-batch begins while a chunk is held");
    due_.batch++;
    due_.batch_hash = hash_of(batch);
    due_.chunk = 0;
  }
  // A GPU may still be busy while the host waits, and wait when the host has gone on.
  double seconds_waited() const { return ring().stream_seconds_waited().value_or(seconds_); }
  std::int64_t bytes_moved() const { return bytes_; }

 protected:
  const ChannelShape& shape() const { return end_.shape; }
  Ring& ring() const { return *end_.ring; }
  std::size_t slot() const { return std::size_t(due_.sequence % std::uint64_t(shape().slots)); }
  View slot_view() const { return {ring().memory(slot()), due_.positions, shape().columns, shape().dtype}; }

  void hold(std::int64_t positions) {
    check(!held_ && due_.batch > 0 && positions > 0 && positions <= shape().positions,
          "the logits channel: a chunk of ", positions, " of at most ", shape().positions, " positions is asked for",
          held_ ? " while another is held" : "", due_.batch == 0 ? " before any micro-batch" : "");
    held_ = true;
    due_.positions = positions;
  }
  template <class Ready>
  void wait(const Ready& ready) {
    ring().begin_wait();
    seconds_ += wait_until(ready, end_.patience, *this);
  }
  void check_held() const { check(held_, "the logits channel: a chunk is handed over that is not held"); }
  void hand_over() {
    held_ = false;
    bytes_ += due_.positions * shape().columns * std::int64_t(size_of(shape().dtype));
    ++due_.sequence;
    ++due_.chunk;
    ring().hand_over(due_.sequence);
  }

  std::string self() const override { return name_of(end_.self); }
  std::string whom() const override { return name_of(end_.other); }
  std::string purpose() const override {
    return text("the logits channel (", side_ == Side::teacher ? "a free slot for " : "", "chunk ", due_.chunk,
                " of micro-batch ", due_.batch, ")");
  }

  ChunkTag due_{};  // what comes next, or is held
  bool held_ = false;

 private:
  std::string trouble() override { return ring().trouble(); }

  RingEnd end_;
  Side side_;
  double seconds_ = 0;
  std::int64_t bytes_ = 0;
};

class RingSource final : public TeacherSource, private End {
 public:
  explicit RingSource(RingEnd end) : End(std::move(end), Side::student) {}
  void begin(const MicroBatch& batch) override { End::begin(batch); }
  ConstView acquire(std::int64_t positions) override {
    hold(positions);
    wait([this] { return is_there() || ring().other_closed(); });
    if (!is_there())
      throw Error(ExitCode::peer_lost, text(whom(), " has closed its end; ", self(), " still needs ", purpose()));
    const ChunkTag& tag = ring().tag(slot());
    check_tag(tag);
    teacher_waited_ = tag.teacher_waited;
    ring().take_over(slot());
    return slot_view();
  }
  void release() override {
    check_held();
    hand_over();
  }
  double seconds_waited() const override { return End::seconds_waited(); }
  double teacher_seconds_waited() const override { return teacher_waited_; }
  std::int64_t bytes_moved() const override { return End::bytes_moved(); }

 private:
  bool is_there() const { return ring().theirs() > due_.sequence; }
  void check_tag(const ChunkTag& found) const {
    check(found.sequence == due_.sequence, "the logits channel from ", whom(), " to ", self(),
          ": a slot holds chunk number ", found.sequence, " where ", due_.sequence, " is due");
    const bool is_same = found.batch == due_.batch && found.chunk == due_.chunk && found.positions == due_.positions;
    check(is_same, "the logits channel: ", whom(), " sent chunk ", found.chunk, " of micro-batch ", found.batch,
          " with ", found.positions, " positions where ", self(), " is at chunk ", due_.chunk, " of micro-batch ",
          due_.batch, " with ", due_.positions, ": the two read different data or cut it differently");
    check(found.batch_hash == due_.batch_hash, "the logits channel: ", whom(), " and ", self(),
          " supervise different tokens in micro-batch ", due_.batch, ": the two read different data");
  }

  double teacher_waited_ = 0;
};

class RingSink final : public LogitsSink, private End {
 public:
  explicit RingSink(RingEnd end) : End(std::move(end), Side::teacher) {}
  void begin(const MicroBatch& batch) override { End::begin(batch); }
  View acquire(std::int64_t positions) override {
    if (ring().other_closed()) return {};
    hold(positions);
    const std::uint64_t slots = std::uint64_t(shape().slots);
    wait([&] { return due_.sequence - ring().theirs() < slots || ring().other_closed(); });
    if (ring().other_closed()) {
      held_ = false;
      return {};
    }
    if (due_.sequence >= slots) ring().take_over(slot());
    return slot_view();
  }
  void publish() override {
    check_held();
    due_.teacher_waited = seconds_waited();
    ring().tag(slot()) = due_;
    hand_over();
  }
  double seconds_waited() const override { return End::seconds_waited(); }
};

}  // namespace

std::string shape_text(const ChannelShape& shape) {
  return text(shape.slots, " slots of ", shape.positions, " positions x ", shape.columns, " ", name_of(shape.dtype));
}

std::size_t slot_bytes(const ChannelShape& shape) {
  constexpr std::size_t page = 4096;
  const std::size_t bytes = std::size_t(shape.positions * shape.columns) * size_of(shape.dtype);
  return (bytes + page - 1) / page * page;
}

std::unique_ptr<TeacherSource> make_source(RingEnd end) { return std::make_unique<RingSource>(std::move(end)); }
std::unique_ptr<LogitsSink> make_sink(RingEnd end) { return std::make_unique<RingSink>(std::move(end)); }

}  // namespace distill
