// The way of teacher logits to the student, seen from both ends. What lies between (the teacher run in place, shared
// memory, a network) is the implementation's business.
//
// Logits of the supervised positions of a micro-batch travel in chunks, in the order the data gives them; both ends see
// the same micro-batches and cut them into the same chunks. One chunk is held at a time. Destroying an end closes it:
// the other end is not left waiting.
//
// Chunks lie in memory of the end's device, and its work is ordered there: what was put on the device before publish()
// or release() is done before the other end's work on the chunk begins. Nobody has to synchronize the device for that.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace distill {

struct MicroBatch;

// Student side.
class TeacherSource {
 public:
  virtual ~TeacherSource() = default;
  // A micro-batch starts.
  virtual void begin(const MicroBatch& batch) = 0;
  // Teacher logits [positions, columns] of the next positions, in the teacher's dtype, readable in place until release.
  virtual ConstView acquire(std::int64_t positions) = 0;
  virtual void release() = 0;
  // Total time spent waiting for the teacher.
  virtual double seconds_waited() const = 0;
  // Total time the teacher has spent waiting for the student, as far as it is known here.
  virtual double teacher_seconds_waited() const { return 0; }
  // Bytes of logits that came from another rank; none when the teacher runs in place.
  virtual std::int64_t bytes_moved() const { return 0; }
};

// Teacher side.
class LogitsSink {
 public:
  virtual ~LogitsSink() = default;
  // A micro-batch starts.
  virtual void begin(const MicroBatch& batch) = 0;
  // Room for the logits [positions, columns] of the next positions. Without memory (data is null) when the student
  // closed its end and wants no more.
  virtual View acquire(std::int64_t positions) = 0;
  virtual void publish() = 0;
  // Total time spent waiting for the student.
  virtual double seconds_waited() const = 0;
};

}  // namespace distill
