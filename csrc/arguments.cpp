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
