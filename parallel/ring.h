// The two ends of a logits channel over any ring of slots: which chunk is due, what a slot must hold, who waits for
// whom. Where the slots lie and how the other side hears of them is the ring's business (shm_channel, message_channel).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "parallel/parallel.h"

namespace distill {

// What a slot holds; written by the teacher before it publishes.
struct ChunkTag {
  std::uint64_t sequence;    // of the chunk, since the start
  std::uint64_t batch;       // micro-batches since the start, counted from 1
  std::uint64_t batch_hash;  // of what the micro-batch supervises
  std::uint64_t chunk;       // within the micro-batch
  std::int64_t positions;
  double teacher_waited;  // seconds that the teacher has waited for free slots since the start
};

// One side of a ring. Chunk n lies in slot n modulo the number of slots.
class Ring {
 public:
  Ring() = default;
  virtual ~Ring() = default;  // closes this side
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // Chunks that the other side has handed over since the start, and whether it hands over no more.
  virtual std::uint64_t theirs() const = 0;
  virtual bool other_closed() const = 0;
  // For the side whose turn the slot is.
  virtual ChunkTag& tag(std::size_t slot) = 0;
  virtual std::byte* memory(std::size_t slot) = 0;
  // What this side does with the slot from now on comes after what the other did before it handed the slot over. Once
  // for every chunk, except for the teacher's first one in each slot.
  virtual void take_over(std::size_t) {}
  // A GPU's time: begin_wait() before this side waits for a slot, and what its stream has waited from there to
  // take_over() so far, seconds. Empty where nothing but the host waits.
  virtual void begin_wait() {}
  virtual std::optional<double> stream_seconds_waited() { return std::nullopt; }
  // This side has now handed over (published or released) `chunks` chunks.
  virtual void hand_over(std::uint64_t chunks) = 0;
  // What is wrong with the other side, empty while it lives; may throw what it has met itself.
  virtual std::string trouble() = 0;
};

enum class Side { student, teacher };

struct RingEnd {
  std::unique_ptr<Ring> ring;
  ChannelShape shape;
  Member self, other;
  Patience patience;
};
std::unique_ptr<TeacherSource> make_source(RingEnd end);
std::unique_ptr<LogitsSink> make_sink(RingEnd end);

// "4 slots of 128 positions x 1000 bf16"
std::string shape_text(const ChannelShape& shape);
// Bytes from one slot to the next: whole pages.
std::size_t slot_bytes(const ChannelShape& shape);

}  // namespace distill
