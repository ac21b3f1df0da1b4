#include "cpu/geometry.h"

#include <c10/util/SmallVector.h>

#include <algorithm>

namespace mk {
namespace {

struct Dim {
  int64_t size, weight, grad;
};

using Dims = c10::SmallVector<Dim, 8>;  // a step makes some for every parameter: without a heap

// Drops dimensions of size 1 and joins neighbours that both tensors walk in one stride.
Dims joined(const Dims& dims) {
  Dims out;
  for (const Dim& d : dims) {
    if (d.size == 1) continue;
    if (!out.empty() && out.back().weight == d.weight * d.size && out.back().grad == d.grad * d.size) {
      out.back() = {out.back().size * d.size, d.weight, d.grad};
    } else {
      out.push_back(d);
    }
  }
  return out;
}

int64_t product(const Dims& dims) {
  int64_t size = 1;
  for (const Dim& d : dims) size *= d.size;
  return size;
}

// Whether the elements fill a stretch of memory without gaps, in the same order in weight and gradient.
bool fills_memory(Dims dims) {
  std::sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.weight < b.weight; });
  int64_t next = 1;
  for (const Dim& d : dims) {
    if (d.size == 1) continue;
    if (d.weight != next || d.grad != next) return false;
    next *= d.size;
  }
  return true;
}

}  // namespace

Geometry geometry_of(const at::Tensor& weight, const at::Tensor& grad, const Layout& layout, bool transposed) {
  Dims all;
  for (int64_t d = 0; d < weight.dim(); d++) all.push_back({weight.size(d), weight.stride(d), grad.stride(d)});

  Dims batch, rows, columns;
  if (layout.view == View::flat) {
    rows = all;
  } else {
    // The canonical order (G, D, C, *kernel).
    TORCH_CHECK_VALUE(weight.dim() >= 2, "view: wanted a weight of two or more dimensions, got ", weight.dim(), ".");
    Dim group{1, 0, 0}, out = all[layout.out_dim], in = all[1 - layout.out_dim];
    if (layout.out_dim == 1) {
      const int64_t groups = layout.channel_groups;
      TORCH_CHECK_VALUE(groups >= 1 && in.size % groups == 0, "channel_groups: wanted a divisor of ", in.size,
                        " inputs, got ", groups, ".");
      in.size /= groups;
      group = {groups, in.size * in.weight, in.size * in.grad};
    }
    Dims kernel(all.begin() + 2, all.end());
    if (layout.view == View::filter) {
      TORCH_CHECK_VALUE(layout.rows >= 1 && out.size % layout.rows == 0, "rows: wanted a divisor of ", out.size,
                        " outputs, got ", layout.rows, ".");
      batch = {group, {out.size / layout.rows, layout.rows * out.weight, layout.rows * out.grad}};
      rows = {{layout.rows, out.weight, out.grad}, in};
      rows.append(kernel.begin(), kernel.end());
    } else if (layout.view == View::matrix) {
      rows = {in};
      rows.append(kernel.begin(), kernel.end());
      columns = {group, out};
    } else {
      if (kernel.size() != 2)
        kernel.erase(std::remove_if(kernel.begin(), kernel.end(), [](const Dim& d) { return d.size == 1; }),
                     kernel.end());
      TORCH_CHECK_VALUE(kernel.size() == 2, "view: 'kernel' wanted two kernel dimensions above 1, got weight shape ",
                        weight.sizes(), ".");
      batch = {group, out, in};
      rows = {kernel[0]};
      columns = {kernel[1]};
    }
  }
  if (transposed) std::swap(rows, columns);

  Geometry g{};
  g.count = product(batch);
  g.n = product(rows);
  g.p = product(columns);
  Dims elements = rows;
  elements.append(columns.begin(), columns.end());
  g.dense = fills_memory(elements);
  g.dense_columns = fills_memory(rows);
  batch = joined(batch);
  rows = joined(rows);
  columns = joined(columns);
  g.batch_dims = int(batch.size());
  g.row_dims = int(rows.size());
  g.dims = g.batch_dims + g.row_dims + int(columns.size());
  TORCH_CHECK_VALUE(g.dims <= max_dims, "params: wanted a weight whose strides join to at most ", max_dims,
                    " dimensions, got shape ", weight.sizes(), " with strides ", weight.strides(), ".");
  int i = 0;
  for (const Dims* dims : {&batch, &rows, &columns}) {
    for (const Dim& d : *dims) {
      g.size[i] = d.size;
      g.weight_stride[i] = d.weight;
      g.grad_stride[i] = d.grad;
      i++;
    }
  }
  return g;
}

std::vector<int64_t> offsets_of(const Geometry& geometry, const int64_t* stride) {
  std::vector<int64_t> offsets;
  offsets.reserve(size_t(geometry.elements()));
  offsets.push_back(0);
  for (int d = geometry.dims - 1; d >= geometry.batch_dims; d--) {
    const size_t inner = offsets.size();
    for (int64_t k = 1; k < geometry.size[d]; k++)
      for (size_t e = 0; e < inner; e++) offsets.push_back(offsets[e] + k * stride[d]);
  }
  return offsets;
}

}  // namespace mk
