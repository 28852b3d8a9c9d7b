// A run before it starts: everything that can be read, checked and computed without building a model. What `distill
// check` prints and what a run starts from.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "apps/data_set.h"
#include "core/model/spec.h"
#include "core/optim/schedule.h"
#include "core/train/data_source.h"
#include "io/config_file.h"
#include "parallel/grid.h"
#include "parallel/parallel.h"

namespace distill {

struct RunPlan {
  Config config;
  Grid grid;
  ModelSpec student;
  std::optional<ModelSpec> teacher;
  std::int64_t vocabulary = 0;  // ids the tokenizer can produce
  DataSet train;
  std::optional<DataSet> validation;
  std::int64_t steps_per_epoch = 0, total_steps = 0, warmup_steps = 0;
  Schedule schedule{};
  std::int64_t logits_chunk = 0;  // positions
  bool student_has_weights = false;
  std::vector<std::string> warnings;  // one line each
};

// Reads models, tokenizers and data of a configuration; all ranks of world call it. `threads` of each rank may encode;
// `progress` shows how far that is. What is wrong is a CommonError.
RunPlan make_plan(const ConfigFile& file, const Grid& grid, Communicator& world, int threads, const Say& progress);

// What one data-parallel rank trains and validates on.
std::unique_ptr<DataSource> training_data(const RunPlan& plan, int dp_rank);
std::unique_ptr<DataSource> validation_data(const RunPlan& plan, int dp_rank);  // null where there is none

// The logits channel of a run with a teacher.
ChannelShape channel_shape(const RunPlan& plan);

// A run that does not resume refuses to mix its checkpoints with those of an older one.
void check_no_old_checkpoints(const Config& config);

// The plan in a few lines.
std::string describe(const RunPlan& plan);

// 1234567 → "1.23 million", 0x40000000 → "1.00 GiB".
std::string count_text(double count);
std::string bytes_text(double bytes);

}  // namespace distill
