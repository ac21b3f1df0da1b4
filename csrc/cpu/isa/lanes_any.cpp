// Small matrices of any size, with every retraction.
#if defined(__GNUC__) && !defined(__clang__)
// Nothing here can be unrolled: -O3 would only take half as long again to compile.
#pragma GCC optimize("O2")
#endif

#include "cpu/lanes.h"

namespace mk {
namespace MK_ISA {
namespace {

template <class R, class Map>
void with_size(const Job& job, const Pass& pass) {
  Lanes<R, Map, Dynamic>(job, Dynamic{int(job.geometry->n), int(job.geometry->p)}).run(pass);
}

template <class R>
void with_map(const Job& job, const Pass& pass) {
  const bool exp = job.retraction == Retraction::exp;
  if (job.manifold == ManifoldCode::sphere)
    return exp ? with_size<R, SphereMap<true>>(job, pass) : with_size<R, SphereMap<false>>(job, pass);
  if (job.manifold == ManifoldCode::oblique)
    return exp ? with_size<R, ObliqueMap<true>>(job, pass) : with_size<R, ObliqueMap<false>>(job, pass);
  switch (job.retraction) {
    case Retraction::polar:
      return with_size<R, StiefelMap<Retraction::polar>>(job, pass);
    case Retraction::cayley:
      return with_size<R, StiefelMap<Retraction::cayley>>(job, pass);
    case Retraction::exp:
      return with_size<R, StiefelMap<Retraction::exp>>(job, pass);
    default:
      return with_size<R, StiefelMap<Retraction::qr>>(job, pass);
  }
}

}  // namespace

void run_any_size(const Job& job, const Pass& pass) {
  return job.storage == Storage::float64 ? with_map<double>(job, pass) : with_map<float>(job, pass);
}

}  // namespace MK_ISA
}  // namespace mk
