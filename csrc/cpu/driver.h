// Runs a step: which kernel takes which group, in what pieces, on which thread.
#pragma once

#include <vector>

#include "cpu/job.h"
#include "cpu/numbering.h"

namespace mk {

// Components left as they are since their gradient or momentum was not finite, one number a job.
std::vector<int64_t> run(const std::vector<Job>& jobs, const PlanTensors& plan);

// The kernels in use, by torch's own choice of instruction set (which ATEN_CPU_CAPABILITY lowers).
const Kernels& kernels();
const char* instruction_set();

// Whether the kernels can take the job, or torch's linear algebra has to (library.h).
bool has_kernel(const Job& job);

}  // namespace mk
