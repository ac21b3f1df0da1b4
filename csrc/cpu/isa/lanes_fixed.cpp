// Small matrices of the sizes in size.h, with the retractions that everyone uses.
#include "cpu/lanes.h"

namespace mk {
namespace MK_ISA {
namespace {

template <class R, class Map>
bool with_size(const Job& job, const Pass& pass) {
  const int n = int(job.geometry->n), p = int(job.geometry->p);
#define MK_RUN(N, P)                                     \
  if (n == N && p == P) {                                \
    Lanes<R, Map, Fixed<N, P>>(job, {}).run(pass);       \
    return true;                                         \
  }
  MK_FIXED_SIZES(MK_RUN)
#undef MK_RUN
  return false;
}

template <class R>
bool with_map(const Job& job, const Pass& pass) {
  if (job.manifold == ManifoldCode::sphere && job.retraction == Retraction::projection)
    return with_size<R, SphereMap<false>>(job, pass);
  if (job.manifold == ManifoldCode::oblique && job.retraction == Retraction::projection)
    return with_size<R, ObliqueMap<false>>(job, pass);
  if (job.manifold == ManifoldCode::stiefel && job.retraction == Retraction::qr)
    return with_size<R, StiefelMap<Retraction::qr>>(job, pass);
  return false;
}

}  // namespace

bool run_fixed_size(const Job& job, const Pass& pass) {
  return job.storage == Storage::float64 ? with_map<double>(job, pass) : with_map<float>(job, pass);
}

}  // namespace MK_ISA
}  // namespace mk
