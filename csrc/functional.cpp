#include "functional.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/where.h>

#include <algorithm>

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

// Matrices that lie one after the other; results that are not there yet are null.
Batch batch_of(const at::Tensor& x, const at::Tensor& q = {}, const at::Tensor& r = {}) {
  const int64_t n = x.size(-2), p = x.size(-1);
  return {x.scalar_type() == at::kDouble,
          x.const_data_ptr(),
          q.defined() ? q.data_ptr() : nullptr,
          r.defined() ? r.data_ptr() : nullptr,
          x.numel() / (n * p),
          n,
          p};
}

void run(const Decomposer& by, Decomposition what, const Batch& batch, at::Device device) {
  if (batch.count > 0) by.run(what, batch, device);
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

}  // namespace

std::tuple<at::Tensor, at::Tensor> qr(const at::Tensor& x, const Decomposer& by) {
  check_matrices(x);
  if (!by.has_kernel(Decomposition::qr, batch_of(x), x.device())) return library_qr(x);
  const int64_t n = x.size(-2), p = x.size(-1), k = std::min(n, p);
  const at::Tensor dense = x.contiguous(), q = like(x, n, k), r = like(x, k, p);
  run(by, Decomposition::qr, batch_of(dense, q, r), x.device());
  return {q, r};
}

at::Tensor qf(const at::Tensor& x, const Decomposer& by) {
  check_matrices(x);
  if (!by.has_kernel(Decomposition::qr, batch_of(x), x.device())) return std::get<0>(library_qr(x));
  const at::Tensor dense = x.contiguous(), q = like(x, x.size(-2), std::min(x.size(-2), x.size(-1)));
  run(by, Decomposition::qr, batch_of(dense, q), x.device());
  return q;
}

at::Tensor polar(const at::Tensor& x, const Decomposer& by) {
  check_matrices(x);
  const bool transposed = x.size(-2) < x.size(-1);
  const at::Tensor upright = transposed ? x.mT() : x;
  if (!by.has_kernel(Decomposition::polar, batch_of(upright), x.device())) return library_polar(x);
  const at::Tensor tall = upright.contiguous(), q = like(tall, tall.size(-2), tall.size(-1));
  run(by, Decomposition::polar, batch_of(tall, q), x.device());
  return transposed ? q.mT().contiguous() : q;
}

}  // namespace mk
