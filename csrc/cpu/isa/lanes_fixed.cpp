// Small matrices of the sizes in size.h with the retractions that everyone trains with.
#include "cpu/fixed_size.h"

namespace mk {
namespace MK_ISA {

bool run_fixed_size(const Job& job, const Pass& pass) {
  if (job.storage == Storage::float64) return false;
  if (job.storage != Storage::float32 && run_fixed_size_half(job, pass)) return true;
  if (job.manifold == ManifoldCode::sphere && job.retraction == Retraction::projection)
    return with_fixed_size<SphereMap<false>>(job, pass);
  if (job.manifold == ManifoldCode::oblique && job.retraction == Retraction::projection)
    return with_fixed_size<ObliqueMap<false>>(job, pass);
  if (job.manifold == ManifoldCode::stiefel && job.retraction == Retraction::qr)
    return job.storage == Storage::float32 ? with_fixed_size<StiefelMap<Retraction::qr, true>>(job, pass)
                                           : with_common_size<StiefelMap<Retraction::qr>>(job, pass);
  return run_fixed_size_other(job, pass);
}

}  // namespace MK_ISA
}  // namespace mk
