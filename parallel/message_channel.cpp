// The logits channel by messages between two ranks: each side has slots of its own. A teacher's note says what a slot
// holds and is followed by its logits; a student's note frees a slot. A note that says "closing" is a side's last, and
// the other answers it with its own last, so neither leaves while the other sends. Each side's reader takes notes as
// they come, whatever that side is busy with: a note or a chunk never waits, because the teacher sends a chunk only
// when the student has a slot free.
#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "parallel/parallel.h"
#include "parallel/ring.h"
#include "parallel/wait.h"

namespace distill {

namespace {

struct Note {
  std::uint64_t is_closing;
  ChunkTag tag;  // of the chunk that follows, from the teacher

  View view() { return {this, 1, std::int64_t(sizeof *this / sizeof(std::int32_t)), DType::i32}; }
};

// What one end sends, under way.
struct Sending {
  Note note{};
  std::unique_ptr<Pending> note_sent, chunk_sent;

  bool is_done() const { return (!note_sent || note_sent->is_done()) && (!chunk_sent || chunk_sent->is_done()); }
  void wait() {
    for (const auto* sent : {&note_sent, &chunk_sent})
      if (*sent) (*sent)->wait();
  }
};

class MessageRing final : public Ring, private Awaited {
 public:
  MessageRing(std::unique_ptr<Communicator> group, Side side, const ChannelShape& shape, const Patience& patience)
      : shape_(shape),
        side_(side),
        patience_(patience),
        exceptions_at_start_(std::uncaught_exceptions()),
        memory_(static_cast<std::byte*>(::operator new(slot_bytes(shape) * slots(), alignment))),
        arrived_(slots()),
        group_(std::move(group)),
        sent_(slots()),
        reader_([this] { run_reader(); }) {}
  ~MessageRing() override {
    // After an error of this side the other may not be there to answer; it sees so itself.
    if (std::uncaught_exceptions() > exceptions_at_start_)
      patience_.peer_timeout = std::min<std::chrono::milliseconds>(patience_.peer_timeout, std::chrono::seconds(5));
    try {
      close();
      wait_until([this] { return has_ended_ && is_all_sent(); }, patience_, *this);
    } catch (...) {
      group_->give_up();
    }
    reader_.join();
  }

  std::uint64_t theirs() const override { return theirs_.load(std::memory_order_acquire); }
  bool other_closed() const override { return other_closed_.load(std::memory_order_acquire); }
  ChunkTag& tag(std::size_t slot) override {
    return side_ == Side::teacher ? sent_[slot].note.tag : arrived_[slot].tag;
  }
  std::byte* memory(std::size_t slot) override {
    if (side_ == Side::teacher)
      sent_[slot].wait();  // the chunk before has arrived, or there were no credit for this one
    return slot_memory(slot);
  }
  void hand_over(std::uint64_t chunks) override {
    const std::lock_guard lock(mutex_);
    if (is_closing_) return;
    const std::size_t slot = std::size_t((chunks - 1) % slots());
    Sending& sending = sent_[slot];
    sending.wait();
    sending.note_sent = group_->start_send(sending.note.view(), other());
    if (side_ == Side::teacher)
      sending.chunk_sent = group_->start_send(chunk(slot, sending.note.tag.positions), other());
  }
  std::string trouble() override {
    const std::lock_guard lock(mutex_);
    if (error_) std::rethrow_exception(error_);
    return {};
  }

 private:
  static constexpr std::align_val_t alignment{4096};
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, alignment); }
  };

  std::size_t slots() const { return std::size_t(shape_.slots); }
  int other() const { return 1 - group_->rank(); }
  std::byte* slot_memory(std::size_t slot) const { return memory_.get() + slot * slot_bytes(shape_); }
  View chunk(std::size_t slot, std::int64_t positions) const {
    return {slot_memory(slot), positions, shape_.columns, shape_.dtype};
  }

  void close() {
    const std::lock_guard lock(mutex_);
    if (is_closing_) return;
    is_closing_ = true;
    last_.note.is_closing = 1;
    last_.note_sent = group_->start_send(last_.note.view(), other());
  }
  bool is_all_sent() const {
    return last_.is_done() && std::all_of(sent_.begin(), sent_.end(), [](const Sending& s) { return s.is_done(); });
  }

  void run_reader() {
    try {
      read();
      other_closed_.store(true, std::memory_order_release);
      close();
    } catch (...) {
      const std::lock_guard lock(mutex_);
      error_ = std::current_exception();
    }
    has_ended_.store(true, std::memory_order_release);
  }
  // Until the other closes.
  void read() {
    for (std::uint64_t n = 0;; theirs_.store(++n, std::memory_order_release)) {
      Note note{};
      group_->recv(note.view(), other());
      if (note.is_closing) return;
      if (side_ == Side::teacher) continue;
      check(note.tag.positions > 0 && note.tag.positions <= shape_.positions, group_->name(), ": a chunk of ",
            note.tag.positions, " positions arrives, of at most ", shape_.positions);
      const std::size_t slot = std::size_t(n % slots());
      arrived_[slot].tag = note.tag;
      group_->recv(chunk(slot, note.tag.positions), other());
    }
  }

  std::string self() const override { return name_of(group_->members()[std::size_t(group_->rank())]); }
  std::string whom() const override { return name_of(group_->members()[std::size_t(other())]); }
  std::string purpose() const override { return text("closing ", group_->name()); }

  ChannelShape shape_;
  Side side_;
  Patience patience_;
  int exceptions_at_start_;
  std::unique_ptr<std::byte, Free> memory_;
  std::vector<Note> arrived_;  // by slot, on the student
  std::unique_ptr<Communicator> group_;
  std::mutex mutex_;           // of what the reader and the owner of this end both do: sending, closing, the error
  std::vector<Sending> sent_;  // by slot
  Sending last_;
  bool is_closing_ = false;
  std::exception_ptr error_;
  std::atomic<std::uint64_t> theirs_{0};
  std::atomic<bool> other_closed_{false}, has_ended_{false};
  std::thread reader_;
};

// Both call.
RingEnd open_ring(Communicator& pair, int other, Side side, const ChannelShape& shape) {
  check(pair.size() == 2 && other == 1 - pair.rank(), "the logits channel: rank ", pair.rank(), " of ", pair.size(),
        " wants rank ", other, " of a group of two");
  const Member self = pair.members()[std::size_t(pair.rank())], there = pair.members()[std::size_t(other)];
  std::unique_ptr<Communicator> group = pair.split(0, pair.rank(), "the logits channel");
  const std::vector<std::string> shapes = group->all_gather(shape_text(shape));
  check(shapes[0] == shapes[1], "the logits channel between ", name_of(group->members()[0]), " and ",
        name_of(group->members()[1]), " has ", shapes[0], " on one side and ", shapes[1], " on the other");
  check(shape.positions > 0 && shape.columns > 0 && shape.slots > 0, "the logits channel: ", shape_text(shape));
  // A reader waits while nobody asks it to; how long is too long is judged, and reported, by those who need a chunk or
  // a slot.
  Patience of_reader = pair.patience().while_alive();
  of_reader.report = [](const std::string&) {};
  group->set_patience(of_reader);
  return {std::make_unique<MessageRing>(std::move(group), side, shape, pair.patience()), shape, self, there,
          pair.patience()};
}

}  // namespace

std::unique_ptr<TeacherSource> open_message_source(Communicator& pair, int teacher, const ChannelShape& shape) {
  return make_source(open_ring(pair, teacher, Side::student, shape));
}
std::unique_ptr<LogitsSink> open_message_sink(Communicator& pair, int student, const ChannelShape& shape) {
  return make_sink(open_ring(pair, student, Side::teacher, shape));
}

}  // namespace distill
