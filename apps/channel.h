// The logits channel of a run: what travels, by which way, and this rank's end of it.
#pragma once

#include <memory>

#include "apps/sides.h"
#include "core/train/payload_choice.h"

namespace distill {

// What the configuration says, or for `auto` the cheaper one by an estimate from a copy and a product measured on the
// first rank. All ranks of world call it; `say` tells the estimates.
Payload decide_payload(const RunPlan& plan, Device& device, Communicator& world, const Say& say);

// A rank's end. Ranks that are not on a last stage, or without a teacher, have none.
struct Channel {
  std::unique_ptr<TeacherSource> source;  // student
  std::unique_ptr<LogitsSink> sink;       // teacher

  // teacher: what a rank that plays both roles has of it.
  // is_gpu: the device has memory of its own.
  Channel(const RunPlan& plan, Payload payload, bool is_gpu, Device& device, const Place& place, const Groups& groups,
          TeacherSide* teacher);
};

}  // namespace distill
