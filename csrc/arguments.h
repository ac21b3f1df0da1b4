// The operator's arguments: what every backend checks before it reads through them.
#pragma once

#include <ATen/core/Tensor.h>

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

void check_parameter(int64_t i, const at::Tensor& weight, const at::Tensor& grad, const at::Tensor& momentum,
                     at::Device device);

void check_row(const GroupRow& row, int64_t r, int64_t parameters, int64_t hypers, int64_t listed, int64_t scales);

// A single orthonormal column is a point of the sphere, where QR and polar both normalise.
void simplify(ManifoldCode& manifold, Retraction& retraction, const Geometry& geometry);

}  // namespace mk
