// Stiefel matrices too large for a lane with a retraction other than QR: the same step by torch's linear algebra.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/job.h"

namespace mk {

// The FG-SGD step of a job over `weight`; momentum may be undefined. Returns the components left as they are.
int64_t library_step(const Job& job, at::Tensor weight, const at::Tensor& grad, at::Tensor momentum);

}  // namespace mk
