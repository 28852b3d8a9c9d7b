// The same bits whichever way the teacher's logits come: in turn, as logits through a channel, or as hidden states.
#include <catch2/catch.hpp>
#include <cstring>
#include <optional>

#include "core/distill/head_loss.h"
#include "core/train/teacher.h"
#include "kernels/backends.h"
#include "parallel/parallel.h"
#include "parallel/shm_channel.h"
#include "test/support/tiny_models.h"

using namespace distill;
using namespace distill::test;

namespace {

constexpr std::int64_t real_vocabulary = 37, chunk = 5, steps = 4;

struct TeacherRank {
  std::unique_ptr<Device> device = make_cpu_device(1);
  EncodedDataSource data{random_samples(30, real_vocabulary, 1), DataPlan{.shape = {4, 2, 1}}};
  EncodedDataSource held_out{random_samples(7, real_vocabulary, 2), validation_plan(3, 1, 0, Layout::packed)};
  Validation validation{&held_out, 3, steps};
  Transformer model;
  Teacher teacher;

  TeacherRank(DType dtype, bool tied)
      : model(*device, tiny_spec("qwen3", tied), dtype,
              {.tokens = std::max(data.most_tokens(), held_out.most_tokens()),
               .supervised = std::max(data.most_supervised(), held_out.most_supervised()),
               .longest = 12,
               .trains = false,
               .recompute = Recompute::none}),
        teacher(*device, model, real_vocabulary, std::max(data.most_tokens(), held_out.most_tokens()),
                std::max(data.most_supervised(), held_out.most_supervised())) {
    randomise(*device, model, 2);
  }
  Tensor head() {
    const ConstView rows = model.head(teacher.columns());
    Tensor copy = device->tensor(rows.rows, rows.cols, rows.dtype);
    device->cast(copy.view(), rows);
    return copy;
  }
};

using Bytes = std::vector<std::byte>;

// All logits of the run, as the student sees them.
Bytes read_all(TeacherSource& source, const TeacherRank& rank) {
  Bytes all;
  const auto read = [&](const StepBatch& batch) {
    for (const MicroBatch& micro : batch.micro) {
      source.begin(micro);
      const std::int64_t count = std::int64_t(micro.supervised.size());
      for (std::int64_t first = 0; first < count; first += chunk) {
        const ConstView logits = source.acquire(std::min(chunk, count - first));
        const std::byte* data_of_chunk = static_cast<const std::byte*>(logits.data);
        all.insert(all.end(), data_of_chunk, data_of_chunk + logits.size() * std::int64_t(size_of(logits.dtype)));
        source.release();
      }
    }
  };
  for (std::int64_t step = 0; step < steps; ++step) {
    read(rank.data.step(step));
    if (step == 2 || step == 3)  // after three steps, and at the end
      for (const std::int64_t batch : {0, 1, 2}) read(rank.held_out.step(batch));
  }
  return all;
}

std::int64_t positions_of(const TeacherRank& rank) {
  std::int64_t positions = 0;
  for (std::int64_t step = 0; step < steps; ++step) positions += rank.data.step(step).global_supervised;
  for (std::int64_t sample = 0; sample < 7; ++sample) positions += 2 * rank.held_out.samples()[sample].supervised();
  return positions;
}

enum class Way { memory, messages };

Bytes through_channel(DType dtype, bool tied, Payload payload, Way way) {
  Bytes all;
  const ChannelShape shape{
      chunk, payload == Payload::hidden ? 24 : head_columns(real_vocabulary, tiny_spec("qwen3", tied).vocabulary),
      dtype, 3};
  const auto heap = heap_memory();
  std::string ticket;
  const GroupMemory::Block memory = heap->make(channel_bytes(shape), "", ticket);
  start_channel(memory.get(), shape);
  run_ranks(2, [&](Communicator& pair) {
    TeacherRank rank(dtype, tied);
    const ChannelEnd end{memory, shape, pair.members()[std::size_t(pair.rank())],
                         pair.members()[std::size_t(1 - pair.rank())], pair.patience()};
    if (pair.rank() == 1) {
      const auto sink = way == Way::memory ? make_shared_sink(end) : open_message_sink(pair, 0, shape);
      Alone stage;
      TeacherLoop(*rank.device, rank.teacher, rank.data, sink.get(), chunk, payload, stage, stage)
          .run(0, steps, rank.validation);
      return;
    }
    auto source = way == Way::memory ? make_shared_source(end) : open_message_source(pair, 1, shape);
    if (payload == Payload::hidden)
      source = std::make_unique<HiddenTeacherSource>(*rank.device, std::move(source), rank.head(), chunk);
    all = read_all(*source, rank);
    check(source->bytes_moved() == positions_of(rank) * shape.columns * std::int64_t(size_of(dtype)),
          source->bytes_moved(), " bytes moved");
  });
  return all;
}

}  // namespace

TEST_CASE("every way of the teacher's logits gives the same bits") {
  const DType dtype = GENERATE(DType::f32, DType::bf16);
  const bool tied = GENERATE(false, true);
  CAPTURE(name_of(dtype), tied);
  TeacherRank local(dtype, tied);
  LocalTeacher in_turn(*local.device, local.teacher, dtype, chunk);
  const Bytes expected = read_all(in_turn, local);
  REQUIRE(std::int64_t(expected.size()) ==
          positions_of(local) * local.teacher.columns() * std::int64_t(size_of(dtype)));
  for (const Way way : {Way::memory, Way::messages})
    for (const Payload payload : {Payload::logits, Payload::hidden}) {
      CAPTURE(int(way), int(payload));
      CHECK(through_channel(dtype, tied, payload, way) == expected);
    }
}
