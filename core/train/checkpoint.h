// The port through which a run keeps its state: complete or absent, and bit for bit what was saved.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/model/params.h"
#include "core/optim/optimizer.h"
#include "core/train/train_state.h"

namespace distill {

// A part of a matrix of the run's state, in device memory: what a rank owns is read by save(), what it needs is filled
// by load(). Several parts may bear one name: a range of a flat storage is the end of a row, whole rows and the begin
// of a row. Parts of several ranks may overlap and be empty.
struct CheckpointTensor {
  std::string name;  // kind/parameter: "values/model.norm.weight", "master/…", "exp_avg/…", "exp_avg_sq/…"
  View data;         // contiguous; f32, bf16, f16 or f64
  std::int64_t whole_rows = 0, whole_cols = 0;
  std::int64_t first_row = 0, first_col = 0;  // of `data` in the whole
};

// save: what this rank is the one to write. load: all that it needs.
enum class CheckpointUse { save, load };

// The parameters in a flat storage, named kind/parameter. Of tensor-parallel ranks that share a part the first one
// writes it, of pipeline stages the first; is_writer: this rank is the one of its data-parallel group.
std::vector<CheckpointTensor> checkpoint_tensors(std::string_view kind, const ParamTable& table, const View& flat,
                                                 CheckpointUse use = CheckpointUse::load, int tp_rank = 0,
                                                 bool is_writer = true);
// The same of a storage of an optimiser's masters or moments. A piece of a matrix is up to three parts: the rest of a
// row, whole rows, the beginning of a row.
std::vector<CheckpointTensor> checkpoint_tensors(std::string_view kind, const std::vector<Optimizer::Piece>& pieces,
                                                 const View& storage, CheckpointUse use);

// All ranks that own state make the same calls in the same order.
class CheckpointStore {
 public:
  CheckpointStore() = default;
  virtual ~CheckpointStore() = default;
  CheckpointStore(const CheckpointStore&) = delete;
  CheckpointStore& operator=(const CheckpointStore&) = delete;

  // Returns once the state is copied to host memory, which waits for the checkpoint before; it is written meanwhile.
  // Where that fails on one rank it fails on all, which is reported: this checkpoint does not exist and older ones are
  // untouched. Throws only where a rank was lost.
  virtual void save(const TrainState& state, const std::vector<CheckpointTensor>& tensors) = 0;
  // Waits until what was saved last is on the disk. Throws on every rank where it could not be written.
  virtual void finish() = 0;
  // The newest good checkpoint of this run; those passed over are reported.
  virtual std::optional<std::string> newest() = 0;
  // Whatever parts the ranks need, and whichever they had when it was saved: together the saved ones cover the needed
  // ones, and no tensor is left that no rank needs.
  virtual TrainState load(const std::string& path, const std::vector<CheckpointTensor>& tensors) = 0;
};

}  // namespace distill
