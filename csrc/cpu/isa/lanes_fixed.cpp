// Small matrices of the sizes in size.h with the retractions that everyone trains with, in float arithmetic: float64 is
// for checking, and would double the time of a build.
#include "cpu/lanes.h"

namespace mk {
namespace MK_ISA {
namespace {

template <class Map>
bool with_size(const Job& job, const Pass& pass) {
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
  if (job.storage == Storage::float64) return false;
  if (job.manifold == ManifoldCode::sphere && job.retraction == Retraction::projection)
    return with_size<SphereMap<false>>(job, pass);
  if (job.manifold == ManifoldCode::oblique && job.retraction == Retraction::projection)
    return with_size<ObliqueMap<false>>(job, pass);
  if (job.manifold == ManifoldCode::stiefel && job.retraction == Retraction::qr)
    return with_size<StiefelMap<Retraction::qr>>(job, pass);
  return false;
}

}  // namespace MK_ISA
}  // namespace mk
