// The step of one component in the next wider type, for the few whose squares leave the range of their own.
#pragma once

#include "cpu/job_rules.h"
#include "cpu/maps.h"
#include "cpu/storage.h"

namespace mk {
namespace MK_ISA {
namespace {

// One component in the next wider type. `second`: the buffer is stored already. `step`: lr/tau, or null to take it from
// the component's own norm, or NaN to stop after the momentum. Returns ||xi||^2, or -1 where the component is left as
// it is.
template <class R, class Map>
double alone(const Job& job, int64_t k, bool second, const double* step) {
  using Wide = typename StorageTraits<R>::Wide;
  const Dynamic size{int(job.geometry->n), int(job.geometry->p)};
  const int E = size.n * size.p;
  const Momentum<R> momentum = momentum_of<R>(job);
  const Momentum<Wide> wide = momentum_of<Wide>(job);
  const int64_t weight = offset_of(*job.geometry, job.geometry->weight_stride, job.component(k));
  const int64_t grad = offset_of(*job.geometry, job.geometry->grad_stride, job.component(k));
  const Wide scale = Wide(job.scale(k));
  Wide q[Dynamic::capacity], d[Dynamic::capacity], xi[Dynamic::capacity];
  R buffer[Dynamic::capacity];
  for (int e = 0; e < E; e++) {
    const R gradient = momentum.gradient(R(0), get<R>(job.storage, job.grad, grad + job.grad_offset[e]));
    const R old_weight = get<R>(job.storage, job.weight, weight + job.weight_offset[e]);
    R stored = gradient;
    if (momentum.buffered) {
      const R old = second || !momentum.first ? get<R>(job.storage, job.momentum, weight + job.weight_offset[e]) : R(0);
      stored = buffer[e] = second ? old : as_stored(job.storage, momentum.buffer(gradient, old));
    }
    const auto finite = [](R x) { return abs(x) <= Limits<R>::largest; };
    if (!finite(gradient) || !finite(stored) || !finite(old_weight)) return -1;
    d[e] = wide.direction(Wide(gradient), Wide(stored));
    q[e] = Wide(old_weight) / scale;
  }
  const Wide square = Map::project(q, d, xi, size);
  if (momentum.buffered && !second)
    for (int e = 0; e < E; e++) set(job.storage, job.momentum, weight + job.weight_offset[e], buffer[e]);
  const Wide length = step ? Wide(*step) : step_size_of<Wide>(job)(square);
  if (length == length) {
    Map::retract(q, xi, -length / scale, square, size);
    for (int e = 0; e < E; e++) set(job.storage, job.weight, weight + job.weight_offset[e], R(q[e] * scale));
  }
  return double(square);
}

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
