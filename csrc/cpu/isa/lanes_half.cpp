// Small matrices of 16-bit numbers, stepped where they lie, with the retractions that everyone trains with.
#include "cpu/fixed_size.h"

namespace mk {
namespace MK_ISA {

bool run_fixed_size_half(const Job& job, const Pass& pass) {
  if (job.manifold == ManifoldCode::sphere && job.retraction == Retraction::projection)
    return with_half_size<SphereMap<false>>(job, pass);
  if (job.manifold == ManifoldCode::oblique && job.retraction == Retraction::projection)
    return with_half_size<ObliqueMap<false>>(job, pass);
  if (job.manifold == ManifoldCode::stiefel && job.retraction == Retraction::qr)
    return with_half_size<StiefelMap<Retraction::qr>>(job, pass);
  return false;
}

}  // namespace MK_ISA
}  // namespace mk
