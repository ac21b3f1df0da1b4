// Stiefel matrices too large for matrices.cuh: the same step by torch's linear algebra, which waits for the device.
#pragma once

#include <optional>

#include "cuda/schedule.h"

namespace mk {
namespace cuda {

void step_by_library(const LibraryGroup& group, const GroupRow& row, const Arguments& arguments,
                     const at::Tensor& steps, const at::Tensor& nonfinite, const std::optional<at::Tensor>& norms,
                     const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf,
                     const std::optional<at::Tensor>& live);

}  // namespace cuda
}  // namespace mk
