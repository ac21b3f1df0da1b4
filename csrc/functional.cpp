// The operators of decompositions.py on the CPU: argument checks, what goes to kernels and what to torch. No
// mathematics.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/decompose.h"

namespace mk {
namespace {

void check_matrices(const at::Tensor& x) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble,
                   "x: wanted float32 or float64, got ", x.scalar_type(), ". Convert it with .float().");
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.size(-2) > 0 && x.size(-1) > 0,
                    "x: wanted matrices (..., n, p) with n, p >= 1, got shape ", x.sizes(), ". Unsqueeze vectors.");
}

at::Tensor like(const at::Tensor& x, int64_t n, int64_t p) {
  at::DimVector size(x.sizes());
  size[x.dim() - 2] = n;
  size[x.dim() - 1] = p;
  return at::empty(size, x.options());
}

bool has_kernel(const at::Tensor& x) { return x.size(-2) * x.size(-1) <= decompose_elements; }

Batch batch_of(const at::Tensor& x, at::Tensor& q, at::Tensor* r) {
  const int64_t n = x.size(-2), p = x.size(-1);
  return {x.scalar_type() == at::kDouble,
          x.const_data_ptr(),
          q.data_ptr(),
          r ? r->data_ptr() : nullptr,
          x.numel() / (n * p),
          n,
          p};
}

// Zeros, NaN where the matrix has NaN or Inf.
at::Tensor poison_of(const at::Tensor& x) { return (x * 0).sum({-2, -1}, /*keepdim=*/true); }

// torch's decompositions on the same contract.
std::tuple<at::Tensor, at::Tensor> library_qr(const at::Tensor& x) {
  const at::Tensor poison = poison_of(x);
  const auto [q, r] = at::linalg_qr(x + poison);
  const at::Tensor negative = r.diagonal(0, -2, -1) < 0;
  const at::Tensor sign = at::where(negative, -1, 1).to(x.scalar_type());
  return {(q * sign.unsqueeze(-2) + poison).contiguous(), (r * sign.unsqueeze(-1)).contiguous()};
}

at::Tensor library_polar(const at::Tensor& x) {
  const at::Tensor poison = poison_of(x);
  const auto [u, s, vh] = at::linalg_svd(at::where(poison == 0, x, 0), /*full_matrices=*/false);
  return (u.matmul(vh) + poison).contiguous();
}

std::tuple<at::Tensor, at::Tensor> qr(const at::Tensor& x) {
  check_matrices(x);
  if (!has_kernel(x)) return library_qr(x);
  const int64_t n = x.size(-2), p = x.size(-1), k = std::min(n, p);
  at::Tensor q = like(x, n, k), r = like(x, k, p);
  const at::Tensor dense = x.contiguous();
  decompose(batch_of(dense, q, &r), decompositions().qr);
  return {q, r};
}

at::Tensor qf(const at::Tensor& x) {
  check_matrices(x);
  if (!has_kernel(x)) return std::get<0>(library_qr(x));
  at::Tensor q = like(x, x.size(-2), std::min(x.size(-2), x.size(-1)));
  const at::Tensor dense = x.contiguous();
  decompose(batch_of(dense, q, nullptr), decompositions().qr);
  return q;
}

at::Tensor polar(const at::Tensor& x) {
  check_matrices(x);
  if (!has_kernel(x)) return library_polar(x);
  const bool transposed = x.size(-2) < x.size(-1);
  const at::Tensor tall = (transposed ? x.mT() : x).contiguous();
  at::Tensor q = like(tall, tall.size(-2), tall.size(-1));
  decompose(batch_of(tall, q, nullptr), decompositions().polar);
  return transposed ? q.mT().contiguous() : q;
}

}  // namespace
}  // namespace mk

TORCH_LIBRARY_IMPL(manifold_kernels, CPU, m) {
  m.impl("qr", &mk::qr);
  m.impl("qf", &mk::qf);
  m.impl("polar", &mk::polar);
}
