#include "core/train/pipeline.h"

#include <algorithm>

#include "core/error.h"

namespace distill {

int most_in_flight(int stages, int stage, int micros) { return std::max(1, std::min(stages - stage, micros)); }

std::vector<PipelineTask> one_f_one_b(int stages, int stage, int micros) {
  check(stages > 0 && stage >= 0 && stage < stages && micros >= 0, "stage ", stage, " of ", stages, ", ", micros,
        " micro-batches");
  std::vector<PipelineTask> tasks;
  const int ahead = std::min(stages - stage - 1, micros);
  for (int m = 0; m < ahead; ++m) tasks.push_back({PipelineTask::Kind::forward, m});
  for (int m = 0; m < micros; ++m) {
    if (m + ahead < micros) tasks.push_back({PipelineTask::Kind::forward, m + ahead});
    tasks.push_back({PipelineTask::Kind::backward, m});
  }
  return tasks;
}

void PipelineLinks::expect_input(View input) {
  if (!is_first()) inputs_.push_back(forward_.start_recv(input, stage() - 1));
}
void PipelineLinks::expect_gradient(View gradient) {
  if (!is_last()) gradients_.push_back(backward_.start_recv(gradient, stage() + 1));
}

void PipelineLinks::send_output(const ConstView& output, std::size_t keep) {
  if (is_last()) return;
  sent_outputs_.push_back(forward_.start_send(output, stage() + 1));
  wait_down_to(sent_outputs_, keep);
}
void PipelineLinks::send_gradient(const ConstView& gradient, std::size_t keep) {
  if (is_first()) return;
  sent_gradients_.push_back(backward_.start_send(gradient, stage() - 1));
  wait_down_to(sent_gradients_, keep);
}

void PipelineLinks::finish() {
  wait_down_to(sent_outputs_, 0);
  wait_down_to(sent_gradients_, 0);
}

void PipelineLinks::wait_for_first(Queue& queue) {
  if (!queue.empty()) wait_down_to(queue, queue.size() - 1);
}

void PipelineLinks::wait_down_to(Queue& queue, std::size_t keep) {
  while (queue.size() > keep) {
    queue.front()->wait();
    queue.erase(queue.begin());
  }
}

}  // namespace distill
