// Small matrices of the sizes in size.h with the retractions that everyone trains with, in float arithmetic: float64 is
// for checking, and would double the time of a build.
#include "cpu/lanes.h"

namespace mk {
namespace MK_ISA {
namespace {

template <class Map>
[[maybe_unused]] bool with_size(const Job& job, const Pass& pass) {
  const int n = int(job.geometry->n), p = int(job.geometry->p);
#define MK_RUN(N, P)                                   \
  if (n == N && p == P) {                              \
    Lanes<float, Map, Fixed<N, P>>(job, {}).run(pass); \
    return true;                                       \
  }
  MK_FIXED_SIZES(MK_RUN)
#undef MK_RUN
  return false;
}

}  // namespace

bool run_fixed_size(const Job& job, const Pass& pass) {
#if defined(__x86_64__) && !defined(__AVX2__)
  // An x86-64 without AVX2 is to be right, not fast: a quarter of a build would go into it.
  return static_cast<void>(job), static_cast<void>(pass), false;
#else
  if (job.storage == Storage::float64) return false;
  if (job.manifold == ManifoldCode::sphere && job.retraction == Retraction::projection)
    return with_size<SphereMap<false>>(job, pass);
  if (job.manifold == ManifoldCode::oblique && job.retraction == Retraction::projection)
    return with_size<ObliqueMap<false>>(job, pass);
  if (job.manifold == ManifoldCode::stiefel && job.retraction == Retraction::qr)
    return with_size<StiefelMap<Retraction::qr>>(job, pass);
  return false;
#endif
}

}  // namespace MK_ISA
}  // namespace mk
