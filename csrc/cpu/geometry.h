// From a tensor's sizes and strides to the geometry of its components: views.py says which elements form one.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/job.h"

namespace mk {

// The columns of a plan that say how a parameter becomes matrices.
struct Layout {
  View view;
  int64_t out_dim, channel_groups, rows;
};

// `transposed`: n and p change places (Stiefel with n < p).
Geometry geometry_of(const at::Tensor& weight, const at::Tensor& grad, const Layout& layout, bool transposed);

// Offsets of a component's elements in matrix order.
std::vector<int64_t> offsets_of(const Geometry& geometry, const int64_t* stride);

}  // namespace mk
