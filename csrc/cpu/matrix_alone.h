// The QR step of one matrix of any size in the next wider type: for matrices whose squares leave the range of their
// own, and for steps so long that Householder's reflections have to take the place of a Gram matrix.
#pragma once

#include <memory>

#include "cpu/job_rules.h"
#include "cpu/matrix_memory.h"
#include "linalg/householder_qf.h"

namespace mk {
namespace MK_ISA {
namespace {

// Of a step beyond this many s nothing is left but its direction, while its squares would overflow.
constexpr double longest_step = 1e30;

// `second`, `step` and what is returned: as alone() in alone.h.
template <class R>
__attribute__((noinline)) double matrix_alone(const Job& job, const Places& weight_places, const Places& grad_places,
                                              int64_t k, bool second, const double* step) {
  using Wide = typename StorageTraits<R>::Wide;
  const int n = int(job.geometry->n), p = int(job.geometry->p);
  const int rows = padded(n, padding);
  const int64_t columns = padded_columns<Wide>(p), count = rows * columns;
  const std::unique_ptr<Wide[]> memory(new Wide[3 * count + columns * columns]());
  const std::unique_ptr<R[]> buffer(new R[count]);
  Wide *q = memory.get(), *d = q + count, *spare = d + count, *A = spare + count;
  const Momentum<R> momentum = momentum_of<R>(job);
  const Momentum<Wide> wide = momentum_of<Wide>(job);
  const int64_t weight = offset_of(*job.geometry, job.geometry->weight_stride, job.component(k));
  const int64_t grad = offset_of(*job.geometry, job.geometry->grad_stride, job.component(k));
  const Wide scale = Wide(job.scale(k));
  for (int i = 0; i < n; i++) {
    for (int j = 0; j < p; j++) {
      const int64_t e = i * columns + j;
      const int64_t here = weight + weight_places.row[i] + weight_places.column[j];
      const R gradient =
          momentum.gradient(R(0), get<R>(job.storage, job.grad, grad + grad_places.row[i] + grad_places.column[j]));
      const R old_weight = get<R>(job.storage, job.weight, here);
      R stored = gradient;
      if (momentum.buffered) {
        const R old = second || !momentum.first ? get<R>(job.storage, job.momentum, here) : R(0);
        stored = buffer[e] = second ? old : as_stored(job.storage, momentum.buffer(gradient, old));
      }
      const auto finite = [](R x) { return abs(x) <= Limits<R>::largest; };
      if (!finite(gradient) || !finite(stored) || !finite(old_weight)) return -1;
      d[e] = wide.direction(Wide(gradient), Wide(stored));
      q[e] = Wide(old_weight) / scale;
    }
  }
  const auto each = [&](const auto& f) {
    for (int i = 0; i < n; i++)
      for (int j = 0; j < p; j++) f(weight + weight_places.row[i] + weight_places.column[j], i * columns + j);
  };
  if (momentum.buffered && !second)
    each([&](int64_t there, int64_t e) { set(job.storage, job.momentum, there, buffer[e]); });

  const Columns all{0, int(columns), columns};
  multiply<Wide>(transposed(q, columns), d, int(columns), all, n,
                 [&](int i, int j, Wide x) { A[i * columns + j] = x; });
  for (int i = 0; i < p; i++)
    for (int j = i; j < p; j++) A[i * columns + j] = A[j * columns + i] = (A[i * columns + j] + A[j * columns + i]) / 2;
  Wide square = 0;
  multiply<Wide>(plain(q, columns), A, rows, all, p, [&](int i, int j, Wide x) {
    Wide& xi = d[i * columns + j];
    xi -= x;
    square += xi * xi;
  });
  const Wide length = step ? Wide(*step) : step_size_of<Wide>(job)(square);
  if (length == length) {
    const Wide norm = sqrt(square), wanted = length / scale;
    const Wide moved = norm > 0 ? min(wanted, Wide(longest_step) / norm) : Wide(0);
    for (int64_t e = 0; e < count; e++) q[e] = fma(-moved, d[e], q[e]);
    householder_qf(q, spare, A, n, p, columns);
    each([&](int64_t there, int64_t e) { set(job.storage, job.weight, there, R(spare[e] * scale)); });
  }
  return double(square);
}

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
