// The logits channel through memory that both ends see: a ring of slots, one chunk of teacher logits each. See
// README.md for the layout.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "parallel/parallel.h"
#include "parallel/ring.h"
#include "parallel/shared_group.h"

namespace distill {

// Zeroed memory that a channel of this shape needs.
std::size_t channel_bytes(const ChannelShape& shape);
// Writes the shape into it; before any end is made.
void start_channel(std::byte* memory, const ChannelShape& shape);

// One end. Memory holds a started channel.
struct ChannelEnd {
  GroupMemory::Block memory;
  ChannelShape shape;
  Member self, other;
  Patience patience;
};
std::unique_ptr<TeacherSource> make_shared_source(const ChannelEnd& end);
std::unique_ptr<LogitsSink> make_shared_sink(const ChannelEnd& end);

// For rings whose slots lie elsewhere: the same ring without slots, in memory of control_bytes(shape).
std::size_t control_bytes(const ChannelShape& shape);
std::unique_ptr<Ring> make_control_ring(const ChannelEnd& end, Side side);
// The end that this rank of group will have of a channel to `other`, which is on the same node; no memory yet.
ChannelEnd end_between(const Communicator& group, int other, const ChannelShape& shape);

// What a rank answers while the channel is opened: a payload, or the error that it met, which both throw.
struct Answer {
  std::string payload;
  std::optional<Error> error;

  static Answer of(const std::function<std::string()>& work);
  std::string packed() const;
  static Answer unpacked(const std::string& packed);
  void check() const;  // throws the error
};

}  // namespace distill
