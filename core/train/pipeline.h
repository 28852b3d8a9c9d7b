// Pipeline parallelism: who does what in which order, and what goes between neighbouring stages.
#pragma once

#include <memory>
#include <vector>

#include "core/communicator.h"

namespace distill {

struct PipelineTask {
  enum class Kind { forward, backward } kind;
  int micro;  // 0, 1, …
  bool operator==(const PipelineTask&) const = default;
};

// One forward, one backward (Narayanan et al. 2021): a stage runs ahead by the stages behind it, then alternates, so it
// holds at most `stages − stage` micro-batches between forward and backward.
std::vector<PipelineTask> one_f_one_b(int stages, int stage, int micros);
// That number of micro-batches.
int most_in_flight(int stages, int stage, int micros);

// The residual stream to the next stage and its gradient to the previous one. What is sent travels while the stage goes
// on; what is expected is received meanwhile. One stage is a pipeline too: it neither sends nor receives.
class PipelineLinks {
 public:
  // The stages of one pipeline, in order; one group for each direction, so that neither waits for the other.
  PipelineLinks(Communicator& forward, Communicator& backward) : forward_(forward), backward_(backward) {}

  bool is_first() const { return stage() == 0; }
  bool is_last() const { return stage() + 1 == stages(); }
  int stage() const { return forward_.rank(); }
  int stages() const { return forward_.size(); }

  // Begins to receive into memory that nothing else touches until receive_…; nothing where there is no such neighbour.
  void expect_input(View input);
  void expect_gradient(View gradient);
  // Returns when what was expected first is there, for the device's work from now on (Pending).
  void receive_input() { wait_for_first(inputs_); }
  void receive_gradient() { wait_for_first(gradients_); }
  // Returns when at most `keep` of what was sent are still on their way, this one included.
  void send_output(const ConstView& output, std::size_t keep);
  void send_gradient(const ConstView& gradient, std::size_t keep);
  // Returns when all that was sent has arrived.
  void finish();

 private:
  using Queue = std::vector<std::unique_ptr<Pending>>;
  void wait_for_first(Queue& queue);
  void wait_down_to(Queue& queue, std::size_t keep);

  Communicator &forward_, &backward_;
  Queue inputs_, gradients_, sent_outputs_, sent_gradients_;
};

}  // namespace distill
