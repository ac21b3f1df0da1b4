#include "cuda/library.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>

#include "cpu/geometry.h"
#include "cpu/library.h"
#include "cuda/context.h"

namespace mk {
namespace cuda {

void step_by_library(const LibraryGroup& group, const GroupRow& row, const Arguments& arguments,
                     const at::Tensor& steps, const at::Tensor& nonfinite, const std::optional<at::Tensor>& norms,
                     const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf,
                     const std::optional<at::Tensor>& live) {
  const size_t i = size_t(row.parameter);
  TORCH_CHECK(!is_capturing(arguments.device), "params[", i, "]: its Stiefel matrices, ", group.geometry.n, " x ",
              group.geometry.p,
              ", are stepped by torch's linear algebra, which no CUDA graph can hold. Take steps outside "
              "of the graph, or leave such weights to another optimizer.");
  if (found_inf.has_value() && found_inf->item<float>() != 0) return;
  const at::Tensor hyper = live.has_value() ? live->cpu() : arguments.hyper;

  Job job{};
  Geometry geometry = group.geometry;
  job.geometry = &geometry;
  job.storage = storage_of(arguments.params[i]);
  job.listed = row.listed ? arguments.components.const_data_ptr<int64_t>() + row.first : nullptr;
  job.first = row.first;
  job.count = row.count;
  job.scales = arguments.scales.const_data_ptr<double>() + row.scale;
  job.scale_stride = row.scale_stride;
  job.rule = Rule(row.rule);
  job.manifold = ManifoldCode(row.manifold);
  job.retraction = Retraction(row.retraction);
  job.hyper = reinterpret_cast<const Hyper*>(hyper.const_data_ptr<double>())[row.hyper];
  job.individual = row.individual != 0;
  job.bounded = row.step_size != 0;
  job.divisor = job.hyper.maximize != 0 ? -1 : 1;
  job.first_step = steps[row.parameter].item<int64_t>() == 0;
  at::Tensor measured;
  if (norms.has_value()) {
    measured = at::empty({row.individual ? row.count : 1}, at::TensorOptions().dtype(at::kDouble));
    job.norms = measured.data_ptr<double>();
  }
  at::Tensor grad = arguments.grads[i];
  if (grad_scale.has_value()) {
    const auto arithmetic = grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    grad = grad.to(arithmetic) / grad_scale->to(arithmetic);
    const Layout layout{View(row.view), row.out_dim, row.channel_groups, row.rows};
    geometry = geometry_of(arguments.params[i], grad, layout, group.transposed);
  }
  const at::Tensor momentum = job.hyper.momentum != 0 ? arguments.momenta[i] : at::Tensor();
  const int64_t left = library_step(job, arguments.params[i], grad, momentum);
  if (left) nonfinite[row.parameter] += left;
  if (norms.has_value()) norms->narrow(0, group.norm, measured.numel()).copy_(measured);
}

}  // namespace cuda
}  // namespace mk
