// The port through which training and validation see data, and its implementation over encoded samples. A step's batch
// is a pure function of the step number; both roles read the same batches, so nothing is shipped between them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/train/balance.h"
#include "core/train/data_order.h"
#include "core/train/micro_batch.h"

namespace distill {

// One step as one dp rank sees it. The global numbers are those of the whole step, all dp ranks together.
struct StepBatch {
  std::vector<MicroBatch> micro;       // this dp rank's; fewer than accumulation only in a last batch that is kept
  std::int64_t global_supervised = 0;  // supervised positions: the loss is divided by it
  std::int64_t global_tokens = 0;      // without padding
  std::int64_t global_samples = 0;
  double epoch = 0;  // epochs of data consumed at the end of this step
};

class DataSource {
 public:
  DataSource() = default;
  virtual ~DataSource() = default;
  DataSource(const DataSource&) = delete;
  DataSource& operator=(const DataSource&) = delete;

  virtual StepBatch step(std::int64_t step) const = 0;
  virtual std::int64_t steps_per_epoch() const = 0;
  // Bounds on rows T and supervised rows C of any micro-batch of any rank: memory is sized by them.
  virtual std::int64_t most_tokens() const = 0;
  virtual std::int64_t most_supervised() const = 0;
};

struct DataPlan {
  BatchShape shape;
  int dp_rank = 0;
  Layout layout = Layout::packed;
  int row_multiple = 1;  // rows of a micro-batch are filled up to a multiple of it
  LastBatch last = LastBatch::drop;
  std::uint64_t seed = 42;
  bool shuffle = true;
  std::optional<SequenceWork> balance = {};  // none: a step is cut in the order of its samples
};

// A plan for validation: file order, every sample exactly once in batches of infer_batch_size sequences per dp rank.
DataPlan validation_plan(int infer_batch_size, int dp_size, int dp_rank, Layout layout, int row_multiple = 1);

class EncodedDataSource : public DataSource {
 public:
  // Too few samples for a step of training, or none at all, is an input error.
  EncodedDataSource(Samples samples, const DataPlan& plan);

  StepBatch step(std::int64_t step) const override;
  std::int64_t steps_per_epoch() const override { return order_.steps_per_epoch(); }
  std::int64_t most_tokens() const override { return most_tokens_; }
  std::int64_t most_supervised() const override { return most_supervised_; }
  const Samples& samples() const { return samples_; }

 private:
  std::vector<std::int32_t> dealt(std::vector<std::int32_t> indices) const;

  Samples samples_;
  DataPlan plan_;
  DataOrder order_;
  std::int64_t most_tokens_ = 0, most_supervised_ = 0;
};

}  // namespace distill
