// The operator of ops.py on the CPU: argument checks, and from the plan's rows to jobs. No mathematics.
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "arguments.h"
#include "cpu/driver.h"
#include "cpu/geometry.h"
#include "cpu/library.h"
#include "front.h"

namespace mk {
namespace {

// What a parameter's jobs point into.
struct Parameter {
  Geometry geometry;
  std::vector<int64_t> weight_offset, grad_offset;
  bool weight_in_order, grad_in_order;

  Parameter(const at::Tensor& weight, const at::Tensor& grad, const Layout& layout, bool transposed)
      : geometry(geometry_of(weight, grad, layout, transposed)) {
    if (geometry.elements() <= lane_elements) {
      weight_offset = offsets_of(geometry, geometry.weight_stride);
      grad_offset = offsets_of(geometry, geometry.grad_stride);
    }
    weight_in_order = in_order(weight_offset);
    grad_in_order = in_order(grad_offset);
  }

  static bool in_order(const std::vector<int64_t>& offsets) {
    for (size_t e = 0; e < offsets.size(); e++)
      if (offsets[e] != int64_t(e)) return false;
    return true;
  }
};

void step_(at::TensorList params, const c10::List<std::optional<at::Tensor>>& grads, at::TensorList momenta,
           at::TensorList variances, const at::Tensor& steps, const at::Tensor& nonfinite, const at::Tensor& groups,
           const at::Tensor& components, const at::Tensor& scales, const at::Tensor& hyper,
           const std::optional<at::Tensor>& norms, const std::optional<at::Tensor>& grad_scale,
           const std::optional<at::Tensor>& found_inf, const std::optional<at::Tensor>& live) {
  const int64_t count = int64_t(params.size());
  check_arguments(params, grads, momenta, variances, steps, nonfinite, groups, components, scales, hyper, norms, live,
                  at::kCPU);
  const Hyper* numbers = reinterpret_cast<const Hyper*>(live.value_or(hyper).const_data_ptr<double>());
  const float *scaled = number_of(grad_scale, "grad_scale", at::kCPU),
              *overflow = number_of(found_inf, "found_inf", at::kCPU);
  const double scale = scaled ? double(*scaled) : 1;
  const auto [grad, taken] = Gradients(params, grads, momenta, at::kCPU);

  // One geometry a parameter; Stiefel matrices with n < p have one of their own.
  std::vector<std::optional<Parameter>> upright(count), transposed(count);
  std::vector<Job> jobs, library_jobs;
  std::vector<int64_t> job_parameter, library_parameter;
  jobs.reserve(groups.size(0));
  job_parameter.reserve(groups.size(0));
  const GroupRow* rows = reinterpret_cast<const GroupRow*>(groups.const_data_ptr<int64_t>());
  const Hyper* terms = reinterpret_cast<const Hyper*>(hyper.const_data_ptr<double>());
  std::vector<uint8_t> has_individual(count, 0), beside_individual;
  for (int64_t r = 0; r < groups.size(0); r++)
    if (rows[r].individual && rows[r].parameter >= 0 && rows[r].parameter < count)
      has_individual[rows[r].parameter] = 1;
  int64_t norm = 0, next_norm = 0;  // where the row's entries in `norms` start and end
  for (int64_t r = 0; r < groups.size(0); r++) {
    const GroupRow& row = rows[r];
    check_row(row, r, count, hyper.size(0), components.numel(), scales.numel());
    norm = next_norm;
    next_norm += row.individual ? row.count : 1;
    const int64_t i = row.parameter;
    if (!grad[i].defined() || row.count == 0) continue;
    const at::Tensor& weight = params[i];
    const Layout layout{View(row.view), row.out_dim, row.channel_groups, row.rows};
    if (!upright[i]) upright[i].emplace(weight, grad[i], layout, false);
    const Parameter* parameter = &*upright[i];
    Job job{};
    job.manifold = ManifoldCode(row.manifold);
    job.retraction = Retraction(row.retraction);
    if (job.manifold == ManifoldCode::stiefel && parameter->geometry.n < parameter->geometry.p) {
      if (!transposed[i]) transposed[i].emplace(weight, grad[i], layout, true);
      parameter = &*transposed[i];
    }
    simplify(job.manifold, job.retraction, parameter->geometry);
    TORCH_CHECK_VALUE(row.listed || row.first <= parameter->geometry.count - row.count, "groups: row ", r,
                      " ends beyond the last component of params[", i, "].");
    job.weight = weight.data_ptr();
    job.grad = grad[i].const_data_ptr();
    job.storage = storage_of(weight);
    job.geometry = &parameter->geometry;
    job.weight_offset = parameter->weight_offset.data();
    job.grad_offset = parameter->grad_offset.data();
    job.weight_in_order = parameter->weight_in_order;
    job.grad_in_order = parameter->grad_in_order;
    job.listed = row.listed ? components.const_data_ptr<int64_t>() + row.first : nullptr;
    job.first = row.first;
    job.count = row.count;
    job.scales = scales.const_data_ptr<double>() + row.scale;
    job.scale_stride = row.scale_stride;
    job.rule = Rule(row.rule);
    job.hyper = numbers[row.hyper];
    const bool adaptive = job.rule == Rule::adam_g && job.manifold == ManifoldCode::grassmann;
    if (adaptive || terms[row.hyper].momentum != 0) {
      check_buffer(i, weight, momenta[i]);
      job.momentum = momenta[i].data_ptr();
    }
    job.individual = row.individual != 0;
    job.bounded = job.rule == Rule::fg_sgd && row.step_size != 0;
    if (norms.has_value() && job.rule == Rule::fg_sgd) job.norms = norms->data_ptr<double>() + norm;
    job.step = steps.const_data_ptr<int64_t>()[i];
    job.first_step = job.step == 0;
    job.divisor = job.hyper.maximize != 0 ? -scale : scale;
    if (adaptive) {
      const auto number = job.storage == Storage::float64 ? at::kDouble : at::kFloat;
      TORCH_CHECK_VALUE(variances[i].numel() == parameter->geometry.count && variances[i].scalar_type() == number &&
                            variances[i].is_contiguous(),
                        "variances[", i, "]: wanted ", parameter->geometry.count, " contiguous numbers of ", number,
                        ", got ", variances[i].toString(), " with ", variances[i].numel(), ".");
      job.variance = variances[i].data_ptr();
    }
    (has_kernel(job) ? jobs : library_jobs).push_back(job);
    (has_kernel(job) ? job_parameter : library_parameter).push_back(i);
  }

  if (norms.has_value()) {
    check_norms(*norms, next_norm);
    std::fill_n(norms->data_ptr<double>(), next_norm, std::nan(""));
  }
  if (overflow && *overflow != 0) return;

  for (const int64_t i : job_parameter) beside_individual.push_back(has_individual[i]);
  int64_t* skipped = nonfinite.data_ptr<int64_t>();
  const std::vector<int64_t> left = run(jobs, {groups, components, beside_individual});
  for (size_t j = 0; j < jobs.size(); j++) skipped[job_parameter[j]] += left[j];
  for (size_t j = 0; j < library_jobs.size(); j++) {
    const int64_t i = library_parameter[j];
    const at::Tensor momentum = library_jobs[j].momentum ? momenta[i] : at::Tensor();
    skipped[i] += library_step(library_jobs[j], params[i], grad[i], momentum);
  }
  for (int64_t i = 0; i < count; i++)
    if (taken[i]) steps.data_ptr<int64_t>()[i]++;
}

#ifndef MK_BUILD_COMPILER
#define MK_BUILD_COMPILER "unknown"
#endif
#ifndef MK_BUILD_TORCH
#define MK_BUILD_TORCH "unknown"
#endif

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = MK_BUILD_COMPILER;
  info["torch"] = MK_BUILD_TORCH;
  info["instruction_set"] = instruction_set();
#ifdef MK_BUILD_CUDA
  info["cuda"] = MK_BUILD_CUDA;  // the toolkit's version, where csrc/cuda is compiled in
#endif
  return info;
}

// The numbers that plan.py, manifolds.py and views.py give the same names.
pybind11::dict codes() {
  const auto table = [](std::initializer_list<std::pair<const char*, int64_t>> entries) {
    pybind11::dict out;
    for (const auto& [name, code] : entries) out[name] = code;
    return out;
  };
  pybind11::dict all;
  all["rules"] = table({{"fg_sgd", int64_t(Rule::fg_sgd)},
                        {"psi_sgd", int64_t(Rule::psi_sgd)},
                        {"sgd_g", int64_t(Rule::sgd_g)},
                        {"adam_g", int64_t(Rule::adam_g)}});
  all["manifolds"] = table({{"euclidean", int64_t(ManifoldCode::euclidean)},
                            {"sphere", int64_t(ManifoldCode::sphere)},
                            {"oblique", int64_t(ManifoldCode::oblique)},
                            {"stiefel", int64_t(ManifoldCode::stiefel)},
                            {"scale_invariant", int64_t(ManifoldCode::scale_invariant)},
                            {"grassmann", int64_t(ManifoldCode::grassmann)}});
  all["retractions"] = table({{"add", int64_t(Retraction::add)},
                              {"projection", int64_t(Retraction::projection)},
                              {"qr", int64_t(Retraction::qr)},
                              {"polar", int64_t(Retraction::polar)},
                              {"cayley", int64_t(Retraction::cayley)},
                              {"exp", int64_t(Retraction::exp)}});
  all["views"] = table({{"kernel", int64_t(View::kernel)},
                        {"filter", int64_t(View::filter)},
                        {"matrix", int64_t(View::matrix)},
                        {"flat", int64_t(View::flat)}});
  all["group_columns"] = group_columns;
  all["hyper_columns"] = hyper_columns;
  return all;
}

}  // namespace
}  // namespace mk

TORCH_LIBRARY_IMPL(manifold_kernels, CPU, m) { m.impl("step_", &mk::step_); }

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "The compiled kernels: build information, and the operator as Python calls it. Operators are registered with "
      "torch.";
  m.def("build_info", &mk::build_info);
  m.def("codes", &mk::codes);
  mk::define_front(m);
}
