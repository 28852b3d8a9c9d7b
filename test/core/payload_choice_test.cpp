// Which payload is cheaper, on cases that a hand can reckon.
#include "core/train/payload_choice.h"

#include <catch2/catch.hpp>

using namespace distill;

namespace {

// bf16, 1 GFLOP/s and 1 GB/s: nanoseconds are FLOP and bytes.
PositionCost cost(double student_flops, double teacher_flops) {
  return {.columns = 1000,
          .hidden = 100,
          .dtype = DType::bf16,
          .student_flops = student_flops,
          .teacher_flops = teacher_flops,
          .flops_per_second = 1e9,
          .copy_bytes_per_second = 1e9};
}

}  // namespace

TEST_CASE("an estimate is the copy and the work of the busier role") {
  // the head product is 200 000, the copy 2000 or 200
  const PayloadChoice c = choose_payload(cost(1e6, 5e5));
  CHECK(c.logits_seconds == Approx(1e-9 * (2000 + 1e6)));
  CHECK(c.hidden_seconds == Approx(1e-9 * (200 + 1e6 + 200'000)));
  CHECK(c.payload == Payload::logits);
}

TEST_CASE("the head product goes to the role with less to do") {
  CHECK(choose_payload(cost(1e6, 1e5)).payload == Payload::logits);  // a busy student
  CHECK(choose_payload(cost(1e5, 1e6)).payload == Payload::hidden);  // a busy teacher
  // Where both have the same to do, the copy decides.
  CHECK(choose_payload(cost(1e6, 1e6)).payload == Payload::hidden);
}

TEST_CASE("a slow channel makes hidden states cheaper, a fast one does not") {
  PositionCost c = cost(1e6, 5e5);
  c.copy_bytes_per_second = 1e6;
  CHECK(choose_payload(c).payload == Payload::hidden);
  c.copy_bytes_per_second = 1e12;
  CHECK(choose_payload(c).payload == Payload::logits);
  c.dtype = DType::f32;  // twice the bytes, here of no weight
  CHECK(choose_payload(c).payload == Payload::logits);
}

TEST_CASE("a choice says what it was made of") {
  CHECK(describe({Payload::hidden, 12.34e-6, 3.4e-6}) == "logits 12.3 us, hidden 3.4 us a position: hidden");
  CHECK_THROWS_WITH(choose_payload({}), Catch::Contains("choose_payload: 0 columns"));
}
