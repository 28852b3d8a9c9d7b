// The logits channel through memory that both ends see: a ring of slots, one chunk of teacher logits each. See
// README.md for the layout.
#pragma once

#include <memory>

#include "parallel/parallel.h"
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

}  // namespace distill
