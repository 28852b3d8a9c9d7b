#include "core/train/payload_choice.h"

#include <algorithm>

#include "core/error.h"

namespace distill {

PayloadChoice choose_payload(const PositionCost& cost) {
  check(cost.columns > 0 && cost.hidden > 0 && cost.flops_per_second > 0 && cost.copy_bytes_per_second > 0,
        "choose_payload: ", cost.columns, " columns, hidden ", cost.hidden, ", ", cost.flops_per_second, " FLOP/s, ",
        cost.copy_bytes_per_second, " B/s");
  const double head = 2 * double(cost.hidden) * double(cost.columns);
  const auto seconds = [&](std::int64_t elements, double student_flops, double teacher_flops) {
    return double(elements) * double(size_of(cost.dtype)) / cost.copy_bytes_per_second +
           std::max(student_flops, teacher_flops) / cost.flops_per_second;
  };
  PayloadChoice choice;
  choice.logits_seconds = seconds(cost.columns, cost.student_flops, cost.teacher_flops + head);
  choice.hidden_seconds = seconds(cost.hidden, cost.student_flops + head, cost.teacher_flops);
  choice.payload = choice.hidden_seconds < choice.logits_seconds ? Payload::hidden : Payload::logits;
  return choice;
}

std::string describe(const PayloadChoice& choice) {
  std::ostringstream out;
  out.precision(3);
  out << "logits " << 1e6 * choice.logits_seconds << " us, hidden " << 1e6 * choice.hidden_seconds
      << " us a position: " << (choice.payload == Payload::logits ? "logits" : "hidden");
  return out.str();
}

}  // namespace distill
