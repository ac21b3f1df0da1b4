#include "arguments.h"

#include <ATen/TensorOperators.h>

#include <string>

namespace mk {
namespace {

std::string kind_of(at::Device device) { return device.is_cpu() ? "CPU" : device.str(); }

}  // namespace

Storage storage_of(const at::Tensor& weight) {
  switch (weight.scalar_type()) {
    case at::kFloat:
      return Storage::float32;
    case at::kDouble:
      return Storage::float64;
    case at::kBFloat16:
      return Storage::bfloat16;
    case at::kHalf:
      return Storage::float16;
    default:
      TORCH_CHECK_TYPE(false, "params: wanted float32, float64, bfloat16 or float16, got ", weight.scalar_type(), ".");
  }
}

void check_table(const at::Tensor& table, const char* name, at::ScalarType dtype, int64_t columns, at::Device device) {
  TORCH_CHECK_VALUE(table.device() == device && table.scalar_type() == dtype && table.is_contiguous(), name,
                    ": wanted a contiguous ", kind_of(device), " tensor of ", dtype, ", got ", table.toString(), ".");
  TORCH_CHECK_VALUE(columns == 0 || (table.dim() == 2 && table.size(1) == columns), name, ": wanted shape (*, ",
                    columns, "), got ", table.sizes(), ".");
}

namespace {

void check_parameter(int64_t i, const at::Tensor& weight, const at::Tensor& grad, const at::Tensor& momentum,
                     at::Device device) {
  TORCH_CHECK_VALUE(weight.device() == device && weight.layout() == at::kStrided, "params[", i, "]: wanted a strided ",
                    kind_of(device), " tensor, got ", weight.toString(), ".");
  storage_of(weight);
  TORCH_CHECK_VALUE(grad.layout() == at::kStrided && grad.device() == device, "grads[", i, "]: wanted a strided ",
                    kind_of(device), " tensor, got ", grad.toString(), ".");
  TORCH_CHECK_VALUE(grad.sizes() == weight.sizes() && grad.scalar_type() == weight.scalar_type(), "grads[", i,
                    "]: wanted ", weight.sizes(), " ", weight.scalar_type(), ", got ", grad.sizes(), " ",
                    grad.scalar_type(), ".");
  if (momentum.numel() == 0) return;
  TORCH_CHECK_VALUE(momentum.device() == device && momentum.sizes() == weight.sizes() &&
                        momentum.scalar_type() == weight.scalar_type() && momentum.strides() == weight.strides(),
                    "momenta[", i, "]: wanted the shape, strides and dtype of the weight, ", weight.sizes(), " ",
                    weight.strides(), " ", weight.scalar_type(), ", got ", momentum.sizes(), " ", momentum.strides(),
                    " ", momentum.scalar_type(), ".");
}

}  // namespace

void check_arguments(at::TensorList params, const c10::List<std::optional<at::Tensor>>& grads, at::TensorList momenta,
                     at::TensorList variances, const at::Tensor& steps, const at::Tensor& nonfinite,
                     const at::Tensor& groups, const at::Tensor& components, const at::Tensor& scales,
                     const at::Tensor& hyper, const std::optional<at::Tensor>& norms,
                     const std::optional<at::Tensor>& live, at::Device device) {
  const int64_t count = int64_t(params.size());
  TORCH_CHECK_VALUE(
      int64_t(grads.size()) == count && int64_t(momenta.size()) == count && int64_t(variances.size()) == count,
      "grads, momenta, variances: wanted lists as long as params (", count, "), got ", grads.size(), ", ",
      momenta.size(), ", ", variances.size(), ".");
  check_table(groups, "groups", at::kLong, group_columns);
  check_table(components, "components", at::kLong, 0);
  check_table(scales, "scales", at::kDouble, 0);
  check_table(hyper, "hyper", at::kDouble, hyper_columns);
  if (live.has_value()) {
    check_table(*live, "live", at::kDouble, hyper_columns, device);
    TORCH_CHECK_VALUE(live->sizes() == hyper.sizes(), "live: wanted the shape of hyper, ", hyper.sizes(), ", got ",
                      live->sizes(), ".");
  }
  check_table(steps, "steps", at::kLong, 0, device);
  check_table(nonfinite, "nonfinite", at::kLong, 0, device);
  if (norms.has_value()) check_table(*norms, "norms", at::kDouble, 0);
  TORCH_CHECK_VALUE(steps.numel() == count && nonfinite.numel() == count, "steps, nonfinite: wanted ", count,
                    " elements, got ", steps.numel(), ", ", nonfinite.numel(), ".");
}

Gradients::Gradients(at::TensorList params, const c10::List<std::optional<at::Tensor>>& grads, at::TensorList momenta,
                     at::Device device)
    : grad(params.size()), taken(params.size(), 0) {
  for (size_t i = 0; i < params.size(); i++) {
    const std::optional<at::Tensor> given = grads.get(i);
    if (!given.has_value() || !given->defined()) continue;
    check_parameter(int64_t(i), params[i], *given, momenta[i], device);
    taken[i] = 1;
    // A lazy negation: torch's fallback does not look into lists of optional tensors.
    if (params[i].numel() > 0) grad[i] = given->is_neg() ? given->resolve_neg() : *given;
  }
}

void check_buffer(int64_t i, const at::Tensor& weight, const at::Tensor& momentum) {
  TORCH_CHECK_VALUE(momentum.numel() > 0, "momenta[", i, "]: wanted a buffer like the weight, ", weight.sizes(),
                    ", got an empty tensor. Only parameters without momentum have none.");
}

void check_norms(const at::Tensor& norms, int64_t entries) {
  TORCH_CHECK_VALUE(norms.dim() == 1 && norms.numel() == entries, "norms: wanted shape (", entries,
                    "), a number for every group and one for each component of an individual one, got ", norms.sizes(),
                    ".");
}

const float* number_of(const std::optional<at::Tensor>& tensor, const char* name, at::Device device) {
  if (!tensor.has_value()) return nullptr;
  TORCH_CHECK_VALUE(tensor->device() == device && tensor->scalar_type() == at::kFloat && tensor->numel() == 1, name,
                    ": wanted one float32 number on the ", kind_of(device), ", got ", tensor->toString(), " of shape ",
                    tensor->sizes(), ".");
  return tensor->const_data_ptr<float>();
}

void check_row(const GroupRow& row, int64_t r, int64_t parameters, int64_t hypers, int64_t listed, int64_t scales) {
  const auto in = [](int64_t x, int64_t end) { return 0 <= x && x < end; };
  TORCH_CHECK_VALUE(in(row.parameter, parameters) && in(row.hyper, hypers) && in(row.rule, 4) && in(row.manifold, 6) &&
                        in(row.retraction, 6) && in(row.view, 4) && in(row.out_dim, 2),
                    "groups: row ", r, " has a number out of range.");
  TORCH_CHECK_VALUE(row.first >= 0 && row.count >= 0 && (!row.listed || row.first <= listed - row.count),
                    "groups: row ", r, " lists components [", row.first, ", ", row.first, " + ", row.count, ") of ",
                    listed, ".");
  const int64_t last_scale = row.scale_stride ? row.scale + row.count - 1 : row.scale;
  TORCH_CHECK_VALUE(row.scale >= 0 && last_scale < scales && in(row.scale_stride, 2), "groups: row ", r,
                    " has a scale out of range.");
}

void simplify(ManifoldCode& manifold, Retraction& retraction, const Geometry& geometry) {
  if (manifold != ManifoldCode::stiefel || geometry.p != 1 || retraction == Retraction::cayley) return;
  manifold = ManifoldCode::sphere;
  if (retraction != Retraction::exp) retraction = Retraction::projection;
}

}  // namespace mk
