#include "parallel/shared_group.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <utility>

#include "parallel/reduce.h"
#include "parallel/shared_segment.h"
#include "parallel/wait.h"

namespace distill {

namespace {

constexpr std::size_t line = 64;
constexpr std::size_t round_up(std::size_t n) { return (n + line - 1) / line * line; }

std::size_t bytes_of(const ConstView& x) { return std::size_t(x.size()) * size_of(x.dtype); }
std::byte* bytes_at(const ConstView& x) { return static_cast<std::byte*>(const_cast<void*>(x.data)); }

// What every rank of the group must call alike.
struct Call {
  const char* name;
  std::uint64_t word;
};

enum class Op : std::uint64_t { barrier, all_reduce, reduce_scatter, all_gather, broadcast };

Call call_of(const char* name, Op op, std::size_t bytes = 0, int detail = 0, DType dtype = DType::f32) {
  return {name,
          std::uint64_t(op) | std::uint64_t(dtype) << 4 | std::uint64_t(detail) << 8 | std::uint64_t(bytes) << 24};
}

struct alignas(line) Arrival {
  std::atomic<std::uint64_t> meetings;  // how many this rank has come to
  std::atomic<std::uint64_t> call[2];   // what it came for, by parity of the meeting
};

struct alignas(line) Mailbox {
  static constexpr std::uint64_t slots = 2;
  std::atomic<std::uint64_t> written;  // slots filled since the beginning
  std::uint64_t message_bytes[slots];  // length of the whole message the slot belongs to
  alignas(line) std::atomic<std::uint64_t> read;
};

// The memory of a group of n ranks: n arrivals, n² mailboxes (from, to) and their slots, and twice (for odd and even
// rounds) n·n staged parts (by whom, for whom) and n result parts.
class GroupLayout {
 public:
  explicit GroupLayout(int ranks) : n_(std::size_t(ranks)) {
    part_ = round_up(std::max<std::size_t>(4 << 10, (512 << 10) / n_));
    letter_ = std::clamp<std::size_t>(round_up((16 << 20) / (Mailbox::slots * n_ * n_)), 4 << 10, 64 << 10);
    mailboxes_ = n_ * sizeof(Arrival);
    letters_ = mailboxes_ + n_ * n_ * sizeof(Mailbox);
    parts_ = letters_ + n_ * n_ * Mailbox::slots * letter_;
  }
  std::size_t bytes() const { return parts_ + 2 * (n_ + 1) * n_ * part_; }
  std::size_t part_bytes() const { return part_; }
  std::size_t letter_bytes() const { return letter_; }

  std::size_t arrival(int rank) const { return std::size_t(rank) * sizeof(Arrival); }
  std::size_t mailbox(int from, int to) const { return mailboxes_ + pair(from, to) * sizeof(Mailbox); }
  std::size_t letter(int from, int to, std::uint64_t slot) const {
    return letters_ + (pair(from, to) * Mailbox::slots + slot % Mailbox::slots) * letter_;
  }
  std::size_t staged(std::uint64_t round, int by, int whom) const { return part(round, pair(by, whom)); }
  std::size_t result(std::uint64_t round, int by) const { return part(round, n_ * n_ + std::size_t(by)); }

 private:
  std::size_t pair(int a, int b) const { return std::size_t(a) * n_ + std::size_t(b); }
  std::size_t part(std::uint64_t round, std::size_t i) const {
    return parts_ + ((round & 1) * (n_ + 1) * n_ + i) * part_;
  }

  std::size_t n_, part_, letter_, mailboxes_, letters_, parts_;
};

class SharedGroup final : public Communicator {
 public:
  SharedGroup(std::string name, int rank, std::vector<Member> members, const Patience& patience,
              GroupMemory::Block block, std::shared_ptr<Lives> lives, std::shared_ptr<GroupMemory> memory)
      : Communicator(std::move(name), rank, std::move(members), patience),
        layout_(size()),
        block_(std::move(block)),
        lives_(std::move(lives)),
        memory_(std::move(memory)) {}
  ~SharedGroup() override { finish_started(); }

 private:
  // Waiting for one rank of this group.
  class WaitFor final : public Awaited {
   public:
    WaitFor(SharedGroup& group, int rank, const char* call) : group_(group), rank_(rank), call_(call) {}
    std::string self() const override { return name_of(group_.members()[std::size_t(group_.rank())]); }
    std::string whom() const override { return name_of(group_.members()[std::size_t(rank_)]); }
    std::string purpose() const override { return text(call_, " of ", group_.name()); }
    std::string trouble() override {
      if (group_.is_given_up()) return "is no longer waited for";
      return group_.lives_->trouble(group_.members()[std::size_t(rank_)].world_rank, group_.patience().peer_dead_after);
    }

   private:
    SharedGroup& group_;
    int rank_;
    const char* call_;
  };

  std::byte* at(std::size_t offset) const { return block_.get() + offset; }
  Arrival& arrival(int r) const { return *std::launder(reinterpret_cast<Arrival*>(at(layout_.arrival(r)))); }
  Mailbox& mailbox(int from, int to) const {
    return *std::launder(reinterpret_cast<Mailbox*>(at(layout_.mailbox(from, to))));
  }

  // Returns when all ranks have come. What a rank wrote before is visible after.
  void meet(const Call& call) {
    ++meetings_;
    Arrival& mine = arrival(rank());
    mine.call[meetings_ & 1].store(call.word, std::memory_order_relaxed);
    mine.meetings.store(meetings_, std::memory_order_release);
    for (int r = 0; r < size(); ++r) {
      const Arrival& other = arrival(r);
      WaitFor who(*this, r, call.name);
      wait_until([&] { return other.meetings.load(std::memory_order_acquire) >= meetings_; }, patience(), who);
      check(other.call[meetings_ & 1].load(std::memory_order_relaxed) == call.word, name(), ": rank ", rank(),
            " calls ", call.name, " while rank ", r, " calls something else or with another shape");
    }
  }

  void do_all_reduce(View x, Reduce op) override {
    const Call call = call_of("all_reduce", Op::all_reduce, bytes_of(x), int(op), x.dtype);
    const std::int64_t width = std::int64_t(size_of(x.dtype)), n = size(), me = rank();
    const std::int64_t longest = std::int64_t(layout_.part_bytes()) / width, line_elements = std::int64_t(line) / width;
    for (std::int64_t first = 0; first < x.size(); first += n * longest) {
      // Rank p reduces part p of this piece; the last piece is cut evenly too.
      const std::int64_t piece = std::min(n * longest, x.size() - first);
      const std::int64_t part =
          std::min(longest, (piece + n * line_elements - 1) / (n * line_elements) * line_elements);
      std::byte* const base = bytes_at(x) + first * width;
      const auto begin = [&](std::int64_t p) { return std::min(p * part, piece); };
      const auto length = [&](std::int64_t p) { return begin(p + 1) - begin(p); };
      ++round_;
      for (std::int64_t p = 0; p < n; ++p)
        if (p != me)
          std::memcpy(at(layout_.staged(round_, rank(), int(p))), base + begin(p) * width,
                      std::size_t(length(p) * width));
      meet(call);
      std::byte* const mine = base + begin(me) * width;
      reduce_part(mine, mine, length(me), x.dtype, op);
      std::memcpy(at(layout_.result(round_, rank())), mine, std::size_t(length(me) * width));
      meet(call);
      for (std::int64_t p = 0; p < n; ++p)
        if (p != me)
          std::memcpy(base + begin(p) * width, at(layout_.result(round_, int(p))), std::size_t(length(p) * width));
    }
  }

  void do_reduce_scatter(View mine, const ConstView& all, Reduce op) override {
    const Call call = call_of("reduce_scatter", Op::reduce_scatter, bytes_of(mine), int(op), mine.dtype);
    const std::int64_t width = std::int64_t(size_of(mine.dtype)), longest = std::int64_t(layout_.part_bytes()) / width;
    for (std::int64_t first = 0; first < mine.size(); first += longest) {
      const std::int64_t part = std::min(longest, mine.size() - first);
      const auto source = [&](int p) { return bytes_at(all) + (p * mine.size() + first) * width; };
      ++round_;
      for (int p = 0; p < size(); ++p)
        if (p != rank()) std::memcpy(at(layout_.staged(round_, rank(), p)), source(p), std::size_t(part * width));
      meet(call);
      reduce_part(bytes_at(mine) + first * width, source(rank()), part, mine.dtype, op);
    }
  }

  // out = reduction, in rank order, of what the others staged for this rank and its own values.
  void reduce_part(std::byte* out, const std::byte* own, std::int64_t count, DType dtype, Reduce op) {
    parts_.resize(std::size_t(size()));
    for (int r = 0; r < size(); ++r) parts_[std::size_t(r)] = r == rank() ? own : at(layout_.staged(round_, r, rank()));
    reduce_in_order(out, parts_, count, dtype, op);
  }

  void do_all_gather(View all, const ConstView& mine) override {
    do_all_gather_bytes(all.mutable_data(), mine.data, bytes_of(mine));
  }
  void do_broadcast(View x, int root) override { do_broadcast_bytes(x.mutable_data(), bytes_of(x), root); }
  void do_barrier() override { meet(call_of("barrier", Op::barrier)); }

  void do_all_gather_bytes(void* all, const void* mine, std::size_t bytes) override {
    const Call call = call_of("all_gather", Op::all_gather, bytes);
    std::byte* const to = static_cast<std::byte*>(all);
    for (std::size_t first = 0; first < bytes; first += layout_.part_bytes()) {
      const std::size_t part = std::min(layout_.part_bytes(), bytes - first);
      ++round_;
      std::memcpy(at(layout_.result(round_, rank())), static_cast<const std::byte*>(mine) + first, part);
      meet(call);
      for (int p = 0; p < size(); ++p)
        std::memcpy(to + std::size_t(p) * bytes + first, at(layout_.result(round_, p)), part);
    }
  }

  void do_broadcast_bytes(void* x, std::size_t bytes, int root) override {
    const Call call = call_of("broadcast", Op::broadcast, bytes, root);
    const std::size_t longest = layout_.part_bytes() * std::size_t(size());  // the result parts of all ranks, in one
    for (std::size_t first = 0; first < bytes; first += longest) {
      const std::size_t piece = std::min(longest, bytes - first);
      std::byte* const here = static_cast<std::byte*>(x) + first;
      ++round_;
      if (rank() == root) std::memcpy(at(layout_.result(round_, 0)), here, piece);
      meet(call);
      if (rank() != root) std::memcpy(here, at(layout_.result(round_, 0)), piece);
    }
  }

  void do_send(const ConstView& x, int to) override {
    Mailbox& box = mailbox(rank(), to);
    WaitFor receiver(*this, to, "send");
    const std::size_t bytes = bytes_of(x);
    std::uint64_t written = box.written.load(std::memory_order_relaxed);
    for (std::size_t first = 0; first < bytes; first += layout_.letter_bytes(), ++written) {
      wait_until([&] { return written - box.read.load(std::memory_order_acquire) < Mailbox::slots; }, patience(),
                 receiver);
      box.message_bytes[written % Mailbox::slots] = bytes;
      std::memcpy(at(layout_.letter(rank(), to, written)), bytes_at(x) + first,
                  std::min(layout_.letter_bytes(), bytes - first));
      box.written.store(written + 1, std::memory_order_release);
    }
  }

  void do_recv(View x, int from) override {
    Mailbox& box = mailbox(from, rank());
    WaitFor sender(*this, from, "recv");
    const std::size_t bytes = bytes_of(x);
    std::uint64_t read = box.read.load(std::memory_order_relaxed);
    for (std::size_t first = 0; first < bytes; first += layout_.letter_bytes(), ++read) {
      wait_until([&] { return box.written.load(std::memory_order_acquire) > read; }, patience(), sender);
      check(box.message_bytes[read % Mailbox::slots] == bytes, name(), ": rank ", rank(), " receives ", bytes,
            " bytes where rank ", from, " sends ", box.message_bytes[read % Mailbox::slots]);
      std::memcpy(bytes_at(x) + first, at(layout_.letter(from, rank(), read)),
                  std::min(layout_.letter_bytes(), bytes - first));
      box.read.store(read + 1, std::memory_order_release);
    }
  }

  std::unique_ptr<Communicator> do_split(const std::vector<int>& parents, int, std::string name) override {
    return make_shared_group(*this, parents, std::move(name), lives_, memory_);
  }

  GroupLayout layout_;
  GroupMemory::Block block_;
  std::shared_ptr<Lives> lives_;
  std::shared_ptr<GroupMemory> memory_;
  // Of collectives, which never run at the same time; sends and receives keep all they need in the mailboxes.
  std::uint64_t meetings_ = 0, round_ = 0;
  std::vector<const void*> parts_;
};

class SegmentMemory final : public GroupMemory {
 public:
  Block make(std::size_t bytes, const std::string& purpose, std::string& ticket) override {
    auto segment = std::make_shared<SharedSegment>(SharedSegment::create(bytes, purpose));
    ticket = segment->name();
    made_[ticket] = segment;
    return Block(segment, segment->data());
  }
  Block attach(const std::string& ticket, std::size_t bytes) override {
    auto segment = std::make_shared<SharedSegment>(SharedSegment::open(ticket, bytes));
    return Block(segment, segment->data());
  }
  void seal(const std::string& ticket) override {
    made_.at(ticket)->unlink();
    made_.erase(ticket);
  }

 private:
  std::map<std::string, std::shared_ptr<SharedSegment>> made_;
};

class HeapMemory final : public GroupMemory {
 public:
  Block make(std::size_t bytes, const std::string&, std::string& ticket) override {
    struct Free {
      void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t(line)); }
    };
    const Block block(static_cast<std::byte*>(::operator new(bytes, std::align_val_t(line))), Free{});
    std::memset(block.get(), 0, bytes);
    const std::lock_guard lock(mutex_);
    ticket = std::to_string(tickets_++);
    made_[ticket] = block;
    return block;
  }
  Block attach(const std::string& ticket, std::size_t) override {
    const std::lock_guard lock(mutex_);
    return made_.at(ticket);
  }
  void seal(const std::string& ticket) override {
    const std::lock_guard lock(mutex_);
    made_.erase(ticket);
  }

 private:
  std::mutex mutex_;
  std::map<std::string, Block> made_;
  int tickets_ = 0;
};

}  // namespace

std::shared_ptr<GroupMemory> segment_memory() { return std::make_shared<SegmentMemory>(); }
std::shared_ptr<GroupMemory> heap_memory() { return std::make_shared<HeapMemory>(); }

std::size_t shared_group_bytes(int ranks) { return GroupLayout(ranks).bytes(); }

std::unique_ptr<Communicator> first_shared_group(std::string name, int rank, std::vector<Member> members,
                                                 const Patience& patience, GroupMemory::Block block,
                                                 std::shared_ptr<Lives> lives, std::shared_ptr<GroupMemory> memory) {
  return std::make_unique<SharedGroup>(std::move(name), rank, std::move(members), patience, std::move(block),
                                       std::move(lives), std::move(memory));
}

std::unique_ptr<Communicator> make_shared_group(Communicator& parent, const std::vector<int>& ranks, std::string name,
                                                std::shared_ptr<Lives> lives, std::shared_ptr<GroupMemory> memory) {
  const bool is_shared = ranks.size() > 1, is_maker = is_shared && ranks.front() == parent.rank();
  GroupMemory::Block block;
  std::string ticket;
  const std::size_t bytes = is_shared ? shared_group_bytes(int(ranks.size())) : 0;
  parent.run_together([&] {
    if (is_maker) block = memory->make(bytes, text("group ", name, " of ", ranks.size(), " ranks"), ticket);
  });
  const std::vector<std::string> tickets = parent.all_gather(ticket);
  parent.run_together([&] {
    if (is_shared && !is_maker) block = memory->attach(tickets[std::size_t(ranks.front())], bytes);
  });
  if (is_maker) memory->seal(ticket);
  if (ranks.empty()) return nullptr;

  std::vector<Member> members;
  for (const int r : ranks) members.push_back(parent.members()[std::size_t(r)]);
  std::unique_ptr<Communicator> group;
  if (is_shared) {
    const int rank = int(std::find(ranks.begin(), ranks.end(), parent.rank()) - ranks.begin());
    return first_shared_group(std::move(name), rank, std::move(members), parent.patience(), std::move(block),
                              std::move(lives), std::move(memory));
  }
  group = std::make_unique<Alone>(std::move(name), std::move(members.front()));
  group->set_patience(parent.patience());
  return group;
}

}  // namespace distill
