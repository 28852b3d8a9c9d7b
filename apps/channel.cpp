#include "apps/channel.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iostream>

#include "apps/flops.h"
#include "core/train/staged_channel.h"
#include "core/train/time_report.h"
#include "io/model_folder.h"

namespace distill {

namespace {

// Bytes per second of one core that writes memory which another reads.
double measure_copy_rate() {
  constexpr std::size_t bytes = 32 << 20;
  std::vector<char> from(bytes, 1), to(bytes, 2);
  double best = 0;
  for (int i = 0; i < 3; ++i) {
    const auto start = std::chrono::steady_clock::now();
    std::memcpy(to.data(), from.data(), bytes);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, double(bytes) / seconds.count());
  }
  return best;
}

// Of a network that nobody has measured: 10 Gbit/s.
constexpr double assumed_network_rate = 1.25e9;

PositionCost position_cost(const RunPlan& plan, Device& device) {
  const Config& config = plan.config;
  const GridSizes& sizes = plan.grid.sizes;
  const double model_ranks = sizes.tp * sizes.pp;
  const double tokens =
      double(plan.train.samples.tokens().size()) / double(std::max<std::int64_t>(plan.train.supervised, 1));
  const std::int64_t columns = head_part(plan, *plan.teacher, 0).columns;
  const double head = 2 * double(plan.teacher->hidden) * double(plan.teacher->vocabulary);
  const auto peak = config.peak_flops.value;
  return {.columns = columns,
          .hidden = plan.teacher->hidden,
          .dtype = config.teacher.model_args.dtype,
          .student_flops = tokens * flops_per_token(plan.student, true) / model_ranks,
          .teacher_flops = std::max(0.0, tokens * flops_per_token(*plan.teacher, false) - head) / model_ranks,
          .flops_per_second = peak ? *peak : measure_peak_flops(device, config.teacher.model_args.dtype),
          .copy_bytes_per_second =
              config.logits_transfer_backend == LogitsTransfer::network ? assumed_network_rate : measure_copy_rate()};
}

// The rows of the teacher's head that its partner would multiply with, [columns, H].
Tensor teacher_head(const RunPlan& plan, Device& device, const Place& place) {
  const ModelSpec& spec = *plan.teacher;
  const VocabularyPart part = head_part(plan, spec, place.tp_rank);
  const ParamTable whole = param_table(spec);
  Param head = *whole.find(spec.tied_head ? "model.embed_tokens.weight" : "lm_head.weight");
  head.rows = part.columns;
  head.first_row = part.first;
  ParamTable table;
  table.add(head);
  Tensor values = device.tensor(part.columns, spec.hidden, plan.config.teacher.model_args.dtype);
  Tensor staging;
  load_weights(plan.config.teacher.model_args.model_name_or_path, whole, table,
               [&](const Param&, std::int64_t first, std::span<const float> block) {
                 const std::int64_t n = std::int64_t(block.size());
                 if (!staging || staging.view().cols < n) staging = device.tensor(1, n, DType::f32);
                 const View wide = staging.view().col_slice(0, n);
                 device.upload(wide, block.data());
                 device.cast(values.view().reshaped(1, head.size()).col_slice(first, n), wide);
               });
  device.synchronize();
  return values;
}

// The two ends of a channel between partners, and how they are opened for one kind of device.
class Opening {
 public:
  Opening(const RunPlan& plan, Payload payload, bool is_gpu, Device& device, const Place& place, Communicator& pair)
      : by_messages_(plan.config.logits_transfer_backend == LogitsTransfer::network),
        is_gpu_(is_gpu),
        device_(device),
        pair_(pair),
        shape_(channel_shape(plan, place, payload)) {}

  std::unique_ptr<TeacherSource> source() {
    constexpr int teacher = 1;
    if (is_gpu_ && !by_messages_) {
      if (auto source = open_gpu_source(pair_, teacher, shape_, device_, obstacle_)) return source;
      say_obstacle();
    }
    auto source =
        by_messages_ ? open_message_source(pair_, teacher, shape_) : open_shared_source(pair_, teacher, shape_);
    if (!is_gpu_) return source;
    return std::make_unique<StagedSource>(device_, std::move(source), shape_.positions, shape_.columns, shape_.dtype);
  }
  std::unique_ptr<LogitsSink> sink() {
    constexpr int student = 0;
    if (is_gpu_ && !by_messages_)
      if (auto sink = open_gpu_sink(pair_, student, shape_, device_, obstacle_)) return sink;
    auto sink = by_messages_ ? open_message_sink(pair_, student, shape_) : open_shared_sink(pair_, student, shape_);
    if (!is_gpu_) return sink;
    return std::make_unique<StagedSink>(device_, std::move(sink), shape_.positions, shape_.columns, shape_.dtype);
  }

 private:
  void say_obstacle() const {
    std::cerr << "warning: " << name_of(pair_.members()[0]) << " cannot read the memory of its teacher's GPU ("
              << obstacle_ << "): the logits are copied through host memory, a ring of "
              << bytes_text(double(channel_bytes(shape_))) << " in /dev/shm" << std::endl;
  }

  bool by_messages_, is_gpu_;
  Device& device_;
  Communicator& pair_;
  ChannelShape shape_;
  std::string obstacle_;
};

}  // namespace

Payload decide_payload(const RunPlan& plan, Device& device, Communicator& world, const Say& say) {
  if (!plan.teacher || world.size() == 1) return Payload::logits;
  if (plan.config.teacher_payload != TeacherPayload::automatic)
    return plan.config.teacher_payload == TeacherPayload::hidden ? Payload::hidden : Payload::logits;
  std::string chosen;
  if (world.rank() == 0) {
    const PayloadChoice choice = choose_payload(position_cost(plan, device));
    say("teacher payload, estimated: " + describe(choice));
    chosen = choice.payload == Payload::hidden ? "hidden" : "logits";
  }
  return world.broadcast(chosen, /*root=*/0) == "hidden" ? Payload::hidden : Payload::logits;
}

Channel::Channel(const RunPlan& plan, Payload payload, bool is_gpu, Device& device, const Place& place,
                 const Groups& groups, TeacherSide* teacher) {
  if (!plan.teacher || place.pp_rank + 1 != plan.grid.sizes.pp) return;
  if (place.role == Role::both) {
    source = std::make_unique<LocalTeacher>(device, teacher->teacher, plan.config.teacher.model_args.dtype,
                                            plan.logits_chunk);
    return;
  }
  Opening opening(plan, payload, is_gpu, device, place, *groups.partners);
  if (place.role == Role::teacher) {
    sink = opening.sink();
    return;
  }
  source = opening.source();
  if (payload == Payload::hidden)
    source = std::make_unique<HiddenTeacherSource>(device, std::move(source), teacher_head(plan, device, place),
                                                   plan.logits_chunk);
}

}  // namespace distill
