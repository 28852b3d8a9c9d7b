// A run before it starts: everything that can be read, checked and computed without building a model. What `distill
// check` prints and what a run starts from.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "apps/data_set.h"
#include "core/model/spec.h"
#include "core/model/vocabulary.h"
#include "core/optim/schedule.h"
#include "core/train/data_source.h"
#include "core/train/payload_choice.h"
#include "io/checkpoint_manifest.h"
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
  bool cuts_tokens = false;           // sequence parallel, both roles
  bool on_gpus = false;               // where the ring of logits lies
  std::vector<std::string> warnings;  // one line each
};

// The grid of a configuration on ranks of these nodes (grid.h). Reads the models' config.json: where counts or sizes do
// not fit, the error names the grids that fit the models.
Grid plan_grid(const ConfigFile& file, std::span<const int> nodes, std::span<const std::string> hosts);

// Reads models, tokenizers and data of a configuration; all ranks of world call it. `threads` of each rank may encode;
// `progress` shows how far that is. What is wrong is a CommonError.
RunPlan make_plan(const ConfigFile& file, const Grid& grid, bool on_gpus, Communicator& world, int threads,
                  const Say& progress);

// What one data-parallel rank trains and validates on.
std::unique_ptr<DataSource> training_data(const RunPlan& plan, int dp_rank);
std::unique_ptr<DataSource> validation_data(const RunPlan& plan, int dp_rank);  // null where there is none

// What a tensor-parallel rank has of a model's embedding and head.
VocabularyPart head_part(const RunPlan& plan, const ModelSpec& spec, int tp_rank);

// The logits channel between the two ranks of a place.
ChannelShape channel_shape(const RunPlan& plan, const Place& place, Payload payload);

// What the run's checkpoints say of it; `threads` of a student rank, 0 where that is not known; `data` where it is.
CheckpointRun checkpoint_run(const Config& config, const Grid& grid, int threads, const DataSet* data = nullptr);

// A run that does not resume refuses to mix its checkpoints with those of an older one; one that does must fit the
// checkpoint that it goes on from. The result says what will be different, one line each.
std::vector<std::string> check_checkpoints(const ConfigFile& file, const CheckpointRun& run);

// The plan in a few lines.
std::string describe(const RunPlan& plan);

// 1234567 → "1.23 million", 0x40000000 → "1.00 GiB".
std::string count_text(double count);
std::string bytes_text(double bytes);

}  // namespace distill
