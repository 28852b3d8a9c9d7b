// "Where the time went": what a run prints at its end.
#pragma once

#include <string>

#include "core/device.h"
#include "core/train/trainer.h"

namespace distill {

// Rate of a large matrix product on this device, floating-point operations per second: what MFU and the report compare
// with.
double measure_peak_flops(Device& device, DType dtype);

// A table: phases of the step, means over the student ranks, then the operations of this rank's device by time, with
// the rate of matrix products and its share of `peak_flops` (0: unknown). Not where work goes on behind the host's
// back: there op_times() says nothing about the work.
std::string time_report(const StepTimes& times, std::int64_t steps, const Device& device, double peak_flops);

}  // namespace distill
