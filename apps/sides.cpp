#include "apps/sides.h"

#include <algorithm>
#include <cstring>

#include "apps/models.h"
#include "io/export.h"

namespace distill {

namespace {

const StrategyConfig& strategy_of(const RunPlan& plan) { return plan.config.student.strategy_args.strategy_config; }

Recompute recompute_of(const RunPlan& plan) {
  if (plan.config.student.model_args.disable_gradient_checkpointing) return Recompute::none;
  return strategy_of(plan).recompute_granularity.value_or(Recompute::full);
}

Transformer::Limits student_limits(const RunPlan& plan, const Sizes& sizes, const Place& place) {
  return {.tokens = sizes.tokens,
          .supervised = sizes.supervised,
          .longest = sizes.longest,
          .trains = true,
          .recompute = recompute_of(plan),
          .in_flight = most_in_flight(plan.grid.sizes.pp, place.pp_rank,
                                      plan.config.student.training_args.gradient_accumulation_steps)};
}

// Two micro-batches of a pipeline stage: one that is on its way to the next stage, and one that is computed.
Transformer::Limits teacher_limits(const RunPlan& plan, const Sizes& sizes) {
  return {.tokens = sizes.tokens,
          .supervised = sizes.supervised,
          .longest = sizes.longest,
          .trains = false,
          .recompute = Recompute::full,
          .in_flight = plan.grid.sizes.pp > 1 ? 2 : 1};
}

OptimizerConfig optimizer_config(const RunPlan& plan) {
  const TrainingArgs& t = plan.config.student.training_args;
  return {.beta1 = t.adam_beta1,
          .beta2 = t.adam_beta2,
          .epsilon = t.adam_epsilon,
          .weight_decay = t.weight_decay,
          .max_grad_norm = plan.config.max_grad_norm};
}

}  // namespace

ModelPart model_part(const RunPlan& plan, const ModelSpec& spec, const Place& place) {
  const GridSizes& sizes = plan.grid.sizes;
  const Range layers = stage_layers(spec.layers, sizes.pp, place.pp_rank);
  return {.tp_size = sizes.tp,
          .tp_rank = place.tp_rank,
          .first_layer = int(layers.begin),
          .end_layer = int(layers.end()),
          .has_embedding = place.pp_rank == 0,
          .has_head = place.pp_rank == sizes.pp - 1,
          .cuts_tokens = plan.cuts_tokens,
          .vocabulary = vocabulary_part(plan.vocabulary, spec.vocabulary, sizes.tp, place.tp_rank)};
}

TeacherSide::TeacherSide(Device& device, const RunPlan& plan, const Sizes& sizes, const Place& place, Communicator& tp)
    : model(device, *plan.teacher, plan.config.teacher.model_args.dtype, teacher_limits(plan, sizes),
            {.part = model_part(plan, *plan.teacher, place), .tp = &tp}),
      teacher(device, model, plan.vocabulary, sizes.tokens, sizes.supervised) {
  fill_weights(device, plan.config.teacher.model_args.model_name_or_path, model.table(), model.spec(),
               std::uint64_t(plan.config.seed), model.values(), nullptr);
}

StudentSide::StudentSide(Device& device, const RunPlan& plan, const Sizes& sizes, const Place& place,
                         const Groups& groups)
    : model(device, plan.student, plan.config.student.model_args.dtype, student_limits(plan, sizes, place),
            {.part = model_part(plan, plan.student, place), .tp = groups.tp.get(), .bucket_parts = plan.grid.sizes.dp}),
      sync(model.table(), model.values(), model.gradients(),
           {.dp = *groups.dp,
            .tp = *groups.tp,
            .kv = groups.kv.get(),
            .tied = plan.student.tied_head ? groups.tied.get() : nullptr},
           strategy_of(plan).use_distributed_optimizer, strategy_of(plan).overlap_grad_reduce),
      optimizer(device, model.table(), model.values(), optimizer_config(plan),
                {.owned = sync.owned(),
                 .counts = strategy_of(plan).use_distributed_optimizer || place.dp_rank == 0,
                 .tp_rank = place.tp_rank}),
      place_(place) {
  fill_weights(device, plan.config.student.model_args.model_name_or_path, model.table(), model.spec(),
               std::uint64_t(plan.config.seed), model.values(), &optimizer);
}

std::vector<CheckpointTensor> StudentSide::state(CheckpointUse use) {
  std::vector<CheckpointTensor> all =
      checkpoint_tensors("values", model.table(), model.values(), use, place_.tp_rank, place_.dp_rank == 0);
  const auto add = [&](std::string_view kind, const View& storage) {
    const auto part = checkpoint_tensors(kind, optimizer.pieces(), storage, use);
    all.insert(all.end(), part.begin(), part.end());
  };
  add("master", optimizer.masters());
  add("exp_avg", optimizer.exp_avg());
  add("exp_avg_sq", optimizer.exp_avg_sq());
  return all;
}

namespace {

// One parameter at a time, gathered on the first student from those that hold its parts.
class ParameterGather {
 public:
  ParameterGather(const RunPlan& plan, Device& device, Transformer& model, Communicator& students)
      : device_(device), model_(model), students_(students) {
    const GridSizes& sizes = plan.grid.sizes;
    for (int pp = 0; pp < sizes.pp; ++pp)
      for (int tp = 0; tp < sizes.tp; ++tp) {
        Place place;
        place.tp_rank = tp;
        place.pp_rank = pp;
        holders_.push_back(
            {role_rank(sizes, place), tp, param_table(model.spec(), model_part(plan, model.spec(), place), sizes.dp)});
      }
  }

  // All students call it. On the first one, values of the whole parameter; nothing elsewhere. A rank that cannot give
  // its part says so instead, since the first one waits for it.
  const std::vector<float>& take(const Param& whole) {
    if (students_.rank() == 0) values_.assign(std::size_t(whole.size()), 0.0f);
    for (const Holder& holder : holders_) {
      const Param* part = holder.table.find(whole.name);
      if (!part || part->is_copy || holder.tp_rank % part->sharers != 0 || part->size() == 0) continue;
      if (students_.rank() == holder.rank) read(*part);
      if (holder.rank != 0) move(*part, holder.rank);
      if (students_.rank() == 0 && problem_.empty()) place(*part);
    }
    return values_;
  }
  // Fails where this rank could not read its parts, and on the first one where any could not.
  void check_all_taken() const {
    if (!problem_.empty()) throw Error(code_, problem_);
  }

 private:
  struct Holder {
    int rank, tp_rank;
    ParamTable table;
  };

  void read(const Param& part) {
    if (problem_.empty()) try {
        Tensor wide = device_.tensor(1, part.size(), DType::f32);
        device_.cast(wide.view(), model_.values().col_slice(part.offset, part.size()));
        part_.resize(std::size_t(part.size()));
        device_.download(part_.data(), wide.view());
      } catch (const Error& error) {
        note(error.code(), error.what());
      } catch (const std::exception& error) {
        note(ExitCode::internal, error.what());
      }
  }
  void note(ExitCode code, const char* problem) {
    code_ = code;
    problem_ = text(name_of(students_.members()[std::size_t(students_.rank())]), ": ", problem);
  }
  void move(const Param& part, int from) {
    if (students_.rank() == from) {
      students_.send(problem_.empty() ? "" : text(int(code_), ' ', problem_), 0);
      if (problem_.empty()) students_.send(host(part), 0);
    } else if (students_.rank() == 0) {
      const std::string problem = students_.recv(from);
      if (problem.empty()) return students_.recv(host(part), from);
      code_ = ExitCode(std::stoi(problem));
      problem_ = problem.substr(problem.find(' ') + 1);
    }
  }
  View host(const Param& part) {
    part_.resize(std::size_t(part.size()));
    return {part_.data(), 1, part.size(), DType::f32};
  }
  void place(const Param& part) {
    for (std::int64_t r = 0; r < part.rows; ++r)
      std::memcpy(values_.data() + (part.first_row + r) * part.whole_cols + part.first_col,
                  part_.data() + r * part.cols, std::size_t(part.cols) * sizeof(float));
  }

  Device& device_;
  Transformer& model_;
  Communicator& students_;
  std::vector<Holder> holders_;
  std::vector<float> values_, part_;
  std::string problem_;
  ExitCode code_ = ExitCode::internal;  // of problem_
};

}  // namespace

void export_student(const std::string& folder, const RunPlan& plan, Device& device, StudentSide& student,
                    Communicator& students) {
  const ParamTable whole = param_table(student.model.spec());
  ParameterGather gather(plan, device, student.model, students);
  if (students.rank() != 0) {
    for (const Param& param : whole.all()) gather.take(param);
    gather.check_all_taken();
    return;
  }
  const std::string& source = plan.config.student.model_args.model_name_or_path;
  const std::vector<float>* values = nullptr;
  std::size_t taken = 0;
  const auto read = [&](const Param& param, std::int64_t first, std::span<float> out) {
    if (first == 0) {
      values = &gather.take(param);
      ++taken;
      gather.check_all_taken();
    }
    std::copy_n(values->begin() + first, out.size(), out.begin());
  };
  try {
    export_model(folder, {.model = source, .tokenizer = source}, whole, student.model.dtype(), read);
  } catch (...) {
    while (taken < whole.all().size()) gather.take(whole.all()[taken++]);  // the others give all they have
    throw;
  }
}

}  // namespace distill
