// The operator's arguments: what every backend checks before it reads through them.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "cpu/job.h"

namespace mk {

// plan.py, GROUP_COLUMNS
struct GroupRow {
  int64_t parameter, hyper, rule, manifold, retraction, view, out_dim, channel_groups, rows, individual, step_size,
      first, count, listed, scale, scale_stride;
};
constexpr int64_t group_columns = sizeof(GroupRow) / sizeof(int64_t);
constexpr int64_t hyper_columns = sizeof(Hyper) / sizeof(double);

Storage storage_of(const at::Tensor& weight);

// A contiguous tensor of numbers on `device`; columns > 0: a matrix of so many.
void check_table(const at::Tensor& table, const char* name, at::ScalarType dtype, int64_t columns,
                 at::Device device = at::kCPU);

// Lists, tables and counters of parameters on `device`.
void check_arguments(at::TensorList params, const c10::List<std::optional<at::Tensor>>& grads, at::TensorList momenta,
                     at::TensorList variances, const at::Tensor& steps, const at::Tensor& nonfinite,
                     const at::Tensor& groups, const at::Tensor& components, const at::Tensor& scales,
                     const at::Tensor& hyper, const std::optional<at::Tensor>& norms,
                     const std::optional<at::Tensor>& live, at::Device device);

// The gradients of such lists, undefined where there is nothing to do; each is checked with its parameter and momentum.
struct Gradients {
  std::vector<at::Tensor> grad;
  std::vector<uint8_t> taken;  // there is one, be it empty
  Gradients(at::TensorList params, const c10::List<std::optional<at::Tensor>>& grads, at::TensorList momenta,
            at::Device device);
};

// Of a parameter whose rule wants a momentum.
void check_buffer(int64_t i, const at::Tensor& weight, const at::Tensor& momentum);

// Room for R of `entries` groups and components.
void check_norms(const at::Tensor& norms, int64_t entries);

// One of AMP's numbers on `device`, or null.
const float* number_of(const std::optional<at::Tensor>& tensor, const char* name, at::Device device);

void check_row(const GroupRow& row, int64_t r, int64_t parameters, int64_t hypers, int64_t listed, int64_t scales);

// A single orthonormal column is a point of the sphere, where QR and polar both normalise.
void simplify(ManifoldCode& manifold, Retraction& retraction, const Geometry& geometry);

}  // namespace mk
