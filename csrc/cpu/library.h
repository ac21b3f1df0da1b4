// Stiefel matrices too large for a lane with a retraction other than QR: the same step by torch's linear algebra.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/job.h"

namespace mk {

// The FG-SGD step of a job over `weight`, on any device; momentum may be undefined. Returns the components left as they
// are. The job's own pointers are not read, but for its list of components, its scales and norms, which lie on the CPU.
int64_t library_step(const Job& job, at::Tensor weight, const at::Tensor& grad, at::Tensor momentum);

}  // namespace mk
