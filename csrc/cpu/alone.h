// The step of one component in the next wider type, for the few whose squares leave the range of their own.
#pragma once

#include "cpu/job_rules.h"
#include "cpu/maps.h"
#include "cpu/storage.h"

namespace mk {
namespace MK_ISA {
namespace {

// f(e, weight, gradient, buffer) for the elements of a component, with the buffer as it is after the step: `stored`
// says that it is in memory already.
template <class R, class F>
void each_element(const Job& job, int64_t k, bool stored, const F& f) {
  const int E = int(job.geometry->elements());
  const Momentum<R> momentum = momentum_of<R>(job);
  const int64_t weight = offset_of(*job.geometry, job.geometry->weight_stride, job.component(k));
  const int64_t grad = offset_of(*job.geometry, job.geometry->grad_stride, job.component(k));
  for (int e = 0; e < E; e++) {
    const int64_t at = weight + job.weight_offset[e];
    const R gradient = momentum.gradient(R(0), get<R>(job.storage, job.grad, grad + job.grad_offset[e]));
    R buffer = gradient;
    if (momentum.buffered) {
      buffer = stored || !momentum.first ? get<R>(job.storage, job.momentum, at) : R(0);
      if (!stored) buffer = as_stored(job.storage, momentum.buffer(gradient, buffer));
    }
    f(e, get<R>(job.storage, job.weight, at), gradient, buffer);
  }
}

// Whether a component that is still to be stepped has nothing but finite numbers.
template <class R>
bool is_finite_as(const Job& job, int64_t k) {
  bool all = true;
  each_element<R>(job, k, false, [&](int, R weight, R gradient, R buffer) {
    for (const R x : {weight, gradient, buffer}) all &= abs(x) <= Limits<R>::largest;
  });
  return all;
}

// One component in the next wider type, its new momentum being stored. `step`: lr/tau, or null to take it from the
// component's own norm, or NaN to stop there. Returns ||xi||^2.
template <class R, class Map>
double alone(const Job& job, int64_t k, const double* step) {
  using Wide = typename StorageTraits<R>::Wide;
  const Dynamic size{int(job.geometry->n), int(job.geometry->p)};
  const int E = size.n * size.p;
  const Momentum<Wide> wide = momentum_of<Wide>(job);
  const Wide scale = Wide(job.scale(k));
  Wide q[Dynamic::capacity], d[Dynamic::capacity], xi[Dynamic::capacity];
  each_element<R>(job, k, true, [&](int e, R weight, R gradient, R buffer) {
    d[e] = wide.direction(Wide(gradient), Wide(buffer));
    q[e] = Wide(weight) / scale;
  });
  const Wide square = Map::project(q, d, xi, size);
  const Wide length = step ? Wide(*step) : step_size_of<Wide>(job)(square);
  if (length == length) {
    const int64_t weight = offset_of(*job.geometry, job.geometry->weight_stride, job.component(k));
    Map::retract(q, xi, -length / scale, square, size);
    for (int e = 0; e < E; e++) set(job.storage, job.weight, weight + job.weight_offset[e], R(q[e] * scale));
  }
  return double(square);
}

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
