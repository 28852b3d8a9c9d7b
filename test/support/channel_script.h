// What the tests of a logits channel send through it: micro-batches of different sizes and logits that tell chunks
// apart.
#pragma once

#include <algorithm>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#include "core/train/logits_channel.h"
#include "core/train/micro_batch.h"
#include "parallel/parallel.h"

namespace distill::test {

inline const ChannelShape shape{8, 50, DType::bf16, 3};

// Micro-batch b has 0 to 30 supervised positions.
inline MicroBatch batch(int b) {
  MicroBatch batch;
  for (int i = 0; i < b * 7 % 31; ++i) {
    batch.supervised.push_back(i);
    batch.labels.push_back(b * 100 + i);
  }
  return batch;
}

inline std::vector<std::int64_t> chunks_of(const MicroBatch& b) {
  std::vector<std::int64_t> chunks;
  for (std::int64_t left = std::int64_t(b.supervised.size()); left > 0; left -= shape.positions)
    chunks.push_back(std::min(left, shape.positions));
  return chunks;
}

inline std::uint16_t element(int b, std::size_t chunk, std::int64_t i) {
  return std::uint16_t(b * 7919 + int(chunk) * 104729 + int(i) * 31);
}

// The teacher's whole run: true when the student took everything.
inline bool teach(
    LogitsSink& sink, int batches, const std::function<void()>& before_each = [] {}) {
  for (int b = 0; b < batches; ++b) {
    const MicroBatch data = batch(b);
    sink.begin(data);
    const auto chunks = chunks_of(data);
    for (std::size_t c = 0; c < chunks.size(); ++c) {
      before_each();
      const View slot = sink.acquire(chunks[c]);
      if (slot.data == nullptr) return false;
      check(slot.rows == chunks[c] && slot.cols == shape.columns && slot.dtype == DType::bf16 && slot.contiguous(),
            "slot ", slot);
      for (std::int64_t i = 0; i < slot.size(); ++i) slot.as<bf16>()[i].bits = element(b, c, i);
      sink.publish();
    }
  }
  return true;
}

// The student's whole run; returns the positions it has seen.
inline std::int64_t learn(
    TeacherSource& source, int batches, const std::function<void()>& before_each = [] {}) {
  std::int64_t positions = 0;
  for (int b = 0; b < batches; ++b) {
    const MicroBatch data = batch(b);
    source.begin(data);
    const auto chunks = chunks_of(data);
    for (std::size_t c = 0; c < chunks.size(); ++c) {
      before_each();
      const ConstView logits = source.acquire(chunks[c]);
      check(logits.rows == chunks[c] && logits.cols == shape.columns, "logits ", logits);
      for (std::int64_t i = 0; i < logits.size(); ++i)
        check(logits.as<bf16>()[i].bits == element(b, c, i), "batch ", b, " chunk ", c, " element ", i);
      source.release();
      positions += chunks[c];
    }
  }
  return positions;
}

inline void some_delay(std::uint64_t& state) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  if (state % 5 == 0) std::this_thread::sleep_for(std::chrono::microseconds(state % 400));
}

}  // namespace distill::test
