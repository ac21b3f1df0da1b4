// The operator of ops.py on a GPU.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace mk {
namespace cuda {

void step_(at::TensorList params, const c10::List<std::optional<at::Tensor>>& grads, at::TensorList momenta,
           at::TensorList variances, const at::Tensor& steps, const at::Tensor& nonfinite, const at::Tensor& groups,
           const at::Tensor& components, const at::Tensor& scales, const at::Tensor& hyper,
           const std::optional<at::Tensor>& norms, const std::optional<at::Tensor>& grad_scale,
           const std::optional<at::Tensor>& found_inf, const std::optional<at::Tensor>& live);

}  // namespace cuda
}  // namespace mk
