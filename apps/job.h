// The main job: builds the objects of a run from its plan and runs this rank's part of it.
#pragma once

#include <chrono>

#include "apps/devices.h"
#include "apps/run_plan.h"
#include "parallel/parallel.h"

namespace distill {

using Clock = std::chrono::steady_clock;

// Every rank of world calls it. `say` prints on one rank only. Returns when the run is over or was stopped after
// saving. What keeps the run from starting, and what stops all students at once, is a CommonError: on every rank where
// it keeps the run from starting, else on every student, and then the teachers return.
// max_time counts from `started`.
ExitCode run_job(const RunPlan& plan, const RunDevices& devices, MpiSession& mpi, int threads,
                 Clock::time_point started, const Say& say);

// What one rank cannot survive: says why and ends all of them, or returns the exit code where there is only one.
int end_run(MpiSession& mpi, const char* message, ExitCode code);

}  // namespace distill
