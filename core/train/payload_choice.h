// What travels from teacher to student: logits, or hidden states that the student multiplies with the teacher's head.
// Which of the two is cheaper is an estimate, a pure function of what one supervised position costs.
#pragma once

#include <cstdint>
#include <string>

#include "core/number.h"

namespace distill {

enum class Payload { logits, hidden };

// Of one rank and the partner that it talks to, per supervised position.
struct PositionCost {
  std::int64_t columns = 0, hidden = 0;  // of the teacher's head, this rank's shard
  DType dtype = DType::bf16;             // of the teacher
  double student_flops = 0;              // of a student rank for one position, the teacher's head product not counted
  double teacher_flops = 0;              // of a teacher rank, the same
  double flops_per_second = 0;           // of one rank
  double copy_bytes_per_second = 0;      // of the channel: written by the teacher and read by the student
};

// Seconds per position with each payload: the copy, and the work of the role that has more of it, which the other role
// waits for. The head product is the teacher's with `logits` and the student's with `hidden`.
struct PayloadChoice {
  Payload payload = Payload::logits;
  double logits_seconds = 0, hidden_seconds = 0;
};
PayloadChoice choose_payload(const PositionCost& cost);

// "logits 12.1 us, hidden 3.4 us a position: hidden"
std::string describe(const PayloadChoice& choice);

}  // namespace distill
