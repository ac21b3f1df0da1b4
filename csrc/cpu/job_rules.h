// The rules of a job in an arithmetic type, and where its components start.
#pragma once

#include "cpu/job.h"
#include "rules/momentum.h"
#include "rules/step_size.h"

namespace mk {

template <class R>
MK_FN Momentum<R> momentum_of(const Job& job) {
  const Hyper& h = job.hyper;
  const bool decays = job.manifold == ManifoldCode::euclidean;
  return {R(h.momentum),   R(1 - h.dampening), R(decays ? h.weight_decay : 0), R(job.divisor), job.first_step,
          h.nesterov != 0, job.divisor == 1,   job.momentum != nullptr};
}

template <class R>
MK_FN StepSize<R> step_size_of(const Job& job) {
  return {R(job.hyper.lr), R(job.hyper.rho), R(job.hyper.curvature), job.bounded};
}

MK_FN int64_t offset_of(const Geometry& g, const int64_t* stride, int64_t component) {
  int64_t offset = 0;
  for (int d = g.batch_dims - 1; d > 0; d--) {  // not the outermost, which mostly is the only one: divisions are slow
    offset += component % g.size[d] * stride[d];
    component /= g.size[d];
  }
  return g.batch_dims ? offset + component * stride[0] : offset;
}

}  // namespace mk
