#include "cpu/library.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_matrix_exp.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_solve.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>

#include "cpu/job_rules.h"

namespace mk {
namespace {

// The job's geometry as a strided view (batch..., n..., p...).
at::Tensor strided(const Geometry& g, const at::Tensor& tensor, const int64_t* stride) {
  return tensor.as_strided(at::IntArrayRef(g.size, g.dims), at::IntArrayRef(stride, g.dims));
}

// All components as a batch (count, n, p), and back.
at::Tensor batch_of(const Geometry& g, const at::Tensor& tensor, const int64_t* stride) {
  return strided(g, tensor, stride).reshape({g.count, g.n, g.p});
}

at::Tensor members(const Job& job, at::Device device) {
  const auto options = at::TensorOptions().dtype(at::kLong);
  if (!job.listed) return at::arange(job.first, job.first + job.count, options.device(device));
  return at::from_blob(const_cast<int64_t*>(job.listed), {job.count}, options).to(device);
}

// The components `which` of tensor become `batch`.
void write_back(const Job& job, at::Tensor& tensor, const at::Tensor& which, const at::Tensor& batch) {
  const Geometry& g = *job.geometry;
  at::Tensor all = batch_of(g, tensor, g.weight_stride);
  all = all.index_copy(0, which, batch.to(tensor.scalar_type()));
  at::Tensor view = strided(g, tensor, g.weight_stride);
  view.copy_(all.reshape(view.sizes()));
}

// Steps are cut to these lengths, in units of the scale. Of a longer one nothing is left but its direction (polar),
// or a rotation by many turns, whose angle rounding has lost (Cayley, exp), while the matrices that they need would
// overflow.
constexpr double longest_step = 1e30, longest_turn = 64;

// The polar factor by Newton-Schulz iteration, as in linalg/polar.h, where all matrices are near to orthonormal ones;
// else by singular values.
at::Tensor polar_factor(const at::Tensor& Y) {
  const double epsilon = Y.scalar_type() == at::kDouble ? Limits<double>::epsilon : Limits<float>::epsilon;
  const at::Tensor I = at::eye(Y.size(-1), Y.options());
  const auto nearer = [](const at::Tensor& Z, const at::Tensor& D) { return Z + Z.matmul(D) / 2; };
  at::Tensor Z = Y;
  for (int step = 0; step < 10; step++) {
    const at::Tensor D = I - Z.mT().matmul(Z);
    const double off = D.square().sum({1, 2}).max().item<double>();
    if (!(off < 1)) break;
    Z = nearer(Z, D);
    if (off <= epsilon * double(Y.size(-1))) return Z;
  }
  const auto [U, S, Vh] = at::linalg_svd(Y, false);
  Z = U.matmul(Vh);
  return nearer(Z, I - Z.mT().matmul(Z));
}

// qf(Q + V), on a GPU; on the CPU matrices.h has it. A Gram matrix of condition <= 1 + ||V||^2 makes a Cholesky factor
// as accurate as rotations as long as the step is short; longer steps take LAPACK's Householder reflections.
at::Tensor qf(const at::Tensor& Y, double longest) {
  if (longest <= 3) {
    const auto [L, info] = at::linalg_cholesky_ex(Y.mT().matmul(Y));
    if (info.eq(0).all().item<bool>()) return at::linalg_solve_triangular(L.mT(), Y, /*upper=*/true, /*left=*/false);
  }
  const auto [Q, R] = at::linalg_qr(Y);
  const at::Tensor diagonal = R.diagonal(0, -2, -1);
  return Q * at::where(diagonal < 0, -at::ones_like(diagonal), at::ones_like(diagonal)).unsqueeze(-2);
}

// The formulas of manifolds/stiefel.h on batches.
at::Tensor turn_of(const at::Tensor& Q, const at::Tensor& V) {
  const at::Tensor A = Q.mT().matmul(V);
  return (A - A.mT()) / 2;
}

at::Tensor cayley(const at::Tensor& Q, const at::Tensor& V) {
  if (Q.size(-1) == Q.size(-2)) {
    const at::Tensor half = turn_of(Q, V) / 2, I = at::eye(Q.size(-1), Q.options());
    return polar_factor(Q.matmul(at::linalg_solve(I - half, I + half)));
  }
  const at::Tensor PV = V - Q.matmul(Q.mT().matmul(V)) / 2;
  const at::Tensor U = at::cat({PV, Q}, -1), Z = at::cat({Q, -PV}, -1);
  const at::Tensor K = at::eye(U.size(-1), U.options()) - Z.mT().matmul(U) / 2;
  return polar_factor(Q + U.matmul(at::linalg_solve(K, Z.mT().matmul(Q))));
}

at::Tensor exponential(const at::Tensor& Q, const at::Tensor& V) {
  const int64_t p = Q.size(-1);
  const at::Tensor A = turn_of(Q, V);
  if (p == Q.size(-2)) return polar_factor(Q.matmul(at::linalg_matrix_exp(A)));
  const at::Tensor I = at::eye(p, Q.options()).expand_as(A);
  const at::Tensor block = at::cat({at::cat({A, -V.mT().matmul(V)}, -1), at::cat({I, A}, -1)}, -2);
  const at::Tensor E = at::linalg_matrix_exp(block).narrow(-1, 0, p);
  return polar_factor(at::cat({Q, V}, -1).matmul(E).matmul(at::linalg_matrix_exp(-A)));
}

}  // namespace

int64_t library_step(const Job& job, at::Tensor weight, const at::Tensor& grad, at::Tensor momentum) {
  const Geometry& g = *job.geometry;
  const auto arithmetic = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor which = members(job, weight.device());
  const auto take = [&](const at::Tensor& tensor, const int64_t* stride) {
    return batch_of(g, tensor, stride).index_select(0, which).to(arithmetic);
  };

  at::Tensor d = take(grad, g.grad_stride);
  if (job.divisor != 1) d = d / job.divisor;
  const at::Tensor W = take(weight, g.weight_stride);
  const at::Tensor placed = W.isfinite().flatten(1).all(1);
  at::Tensor usable = d.isfinite().flatten(1).all(1).logical_and(placed);
  at::Tensor buffer, old;
  if (momentum.defined()) {
    old = take(momentum, g.weight_stride);
    buffer = job.first_step ? d : (old * job.hyper.momentum).add(d, 1 - job.hyper.dampening);
    buffer = buffer.to(weight.scalar_type()).to(arithmetic);
    usable = usable.logical_and(buffer.isfinite().flatten(1).all(1));
  }
  const at::Tensor column = usable.view({-1, 1, 1});
  const auto clean = [&](const at::Tensor& x) { return at::where(column, x, at::zeros_like(x)); };
  const auto largest = [](const at::Tensor& x) { return x.abs().flatten(1).amax(1).to(at::kDouble); };
  const bool ahead = momentum.defined() && job.hyper.nesterov != 0;
  const at::Tensor gradient = clean(d);
  d = momentum.defined() ? clean(buffer) : gradient;
  // Directions of length about one, so that no square overflows; their size comes back as a factor in double.
  const at::Tensor size = ahead ? at::maximum(largest(d), largest(gradient)) : largest(d);
  const at::Tensor safe = at::where(size > 0, size, at::ones_like(size));
  const at::Tensor divisor = safe.to(arithmetic).view({-1, 1, 1});
  d = ahead ? (gradient / divisor).add(d / divisor, job.hyper.momentum) : d / divisor;

  const at::Tensor scales = at::from_blob(const_cast<double*>(job.scales), {job.scale_stride ? job.count : 1},
                                          at::TensorOptions().dtype(at::kDouble))
                                .to(weight.device())
                                .expand({job.count});
  const at::Tensor s = scales.to(arithmetic).view({-1, 1, 1});
  const at::Tensor Q = at::where(placed.view({-1, 1, 1}), W / s, at::eye(g.n, g.p, W.options()));
  const at::Tensor QD = Q.mT().matmul(d);
  const at::Tensor xi = d - Q.matmul(QD + QD.mT()) / 2;

  const StepSize<double> step_size = step_size_of<double>(job);
  const at::Tensor norm = xi.to(at::kDouble).square().flatten(1).sum(1).sqrt();
  const at::Tensor squares = (norm * safe).square();
  at::Tensor factor;
  if (job.individual) {
    const at::Tensor here = squares.cpu().clone();
    for (int64_t k = 0; k < job.count; k++) here.data_ptr<double>()[k] = step_size(here.const_data_ptr<double>()[k]);
    factor = here.to(weight.device());
  } else {
    factor = at::full_like(squares, step_size(squares.sum().item<double>()));
  }
  if (job.norms) {
    const at::Tensor norms = at::where(usable, norm * safe, at::full_like(norm, std::nan(""))).cpu();
    if (job.individual) {
      std::copy_n(norms.const_data_ptr<double>(), job.count, job.norms);
    } else {
      *job.norms = std::sqrt(squares.sum().item<double>());
    }
  }
  const double limit =
      job.retraction == Retraction::cayley || job.retraction == Retraction::exp ? longest_turn : longest_step;
  const at::Tensor stretch =
      at::where(norm > 0, at::minimum(factor * safe / scales, limit / norm), at::zeros_like(norm));
  const at::Tensor V = (xi * -stretch.view({-1, 1, 1})).to(arithmetic);

  at::Tensor next;
  switch (job.retraction) {
    case Retraction::cayley:
      next = cayley(Q, V);
      break;
    case Retraction::exp:
      next = exponential(Q, V);
      break;
    case Retraction::qr:
      next = qf(Q + V, (stretch * norm).max().item<double>());
      break;
    default:
      next = polar_factor(Q + V);
  }
  write_back(job, weight, which, at::where(column, next * s, W));
  if (momentum.defined()) write_back(job, momentum, which, at::where(column, buffer, old));
  return job.count - usable.sum().item<int64_t>();
}

}  // namespace mk
