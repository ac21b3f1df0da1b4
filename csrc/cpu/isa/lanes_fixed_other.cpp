// The commonest sizes with the other retractions, in an object of its own, to be compiled beside lanes_fixed.cpp.
#include "cpu/fixed_size.h"

namespace mk {
namespace MK_ISA {

bool run_fixed_size_other(const Job& job, const Pass& pass) {
  if (job.manifold == ManifoldCode::sphere) return with_common_size<SphereMap<true>>(job, pass);
  if (job.manifold == ManifoldCode::oblique) return with_common_size<ObliqueMap<true>>(job, pass);
  switch (job.retraction) {
    case Retraction::polar:
      return with_common_size<StiefelMap<Retraction::polar>>(job, pass);
    case Retraction::cayley:
      return with_common_size<StiefelMap<Retraction::cayley>>(job, pass);
    default:
      return with_common_size<StiefelMap<Retraction::exp>>(job, pass);
  }
}

}  // namespace MK_ISA
}  // namespace mk
