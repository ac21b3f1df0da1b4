// Weights of several groups at once (collection.h): which jobs can go together, and the order of their work.
#pragma once

#include <vector>

#include "cpu/numbering.h"

namespace mk {

// Steps the jobs that form collections. Adds to `nonfinite` as run() returns it, and returns the numbers of the jobs
// that are still to be stepped.
std::vector<int> step_collections(const std::vector<Job>& jobs, std::vector<int64_t>& nonfinite,
                                  const PlanTensors& plan);

}  // namespace mk
