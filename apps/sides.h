// What a rank of either role works with: its part of the model, and for a student what trains it.
#pragma once

#include <vector>

#include "apps/run_plan.h"
#include "core/optim/optimizer.h"
#include "core/train/checkpoint.h"
#include "core/train/gradient_sync.h"
#include "core/train/teacher.h"
#include "parallel/grid.h"

namespace distill {

// Largest micro-batch of training and validation.
struct Sizes {
  std::int64_t tokens = 0, supervised = 0;
  int longest = 0;
};

// A model's part at a place of the grid.
ModelPart model_part(const RunPlan& plan, const ModelSpec& spec, const Place& place);

// The teacher's part of the model and what it runs on.
struct TeacherSide {
  Transformer model;
  Teacher teacher;

  TeacherSide(Device& device, const RunPlan& plan, const Sizes& sizes, const Place& place, Communicator& tp);
};

struct StudentSide {
  Transformer model;
  GradientSync sync;
  Optimizer optimizer;

  StudentSide(Device& device, const RunPlan& plan, const Sizes& sizes, const Place& place, const Groups& groups);

  // What a checkpoint holds of this rank, or what this rank needs of one.
  std::vector<CheckpointTensor> state(CheckpointUse use);

 private:
  Place place_;
};

// The student as a Hugging Face folder, written by the first student rank; all students call it. Memory: one parameter.
void export_student(const std::string& folder, const RunPlan& plan, Device& device, StudentSide& student,
                    Communicator& students);

}  // namespace distill
