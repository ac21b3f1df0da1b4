// Small matrices of any size, with every retraction.
#if defined(__GNUC__) && !defined(__clang__)
// Nothing here can be unrolled: -O3 would only take half as long again to compile.
#pragma GCC optimize("O2")
#endif

#include "cpu/alone.h"
#include "cpu/lanes.h"

namespace mk {
namespace MK_ISA {
namespace {

// f(map) with the map of the job's manifold and retraction.
template <class F>
auto with_map(const Job& job, const F& f) {
  const bool exp = job.retraction == Retraction::exp;
  if (job.manifold == ManifoldCode::sphere) return exp ? f(SphereMap<true>{}) : f(SphereMap<false>{});
  if (job.manifold == ManifoldCode::oblique) return exp ? f(ObliqueMap<true>{}) : f(ObliqueMap<false>{});
  switch (job.retraction) {
    case Retraction::polar:
      return f(StiefelMap<Retraction::polar>{});
    case Retraction::cayley:
      return f(StiefelMap<Retraction::cayley>{});
    case Retraction::exp:
      return f(StiefelMap<Retraction::exp>{});
    default:
      return f(StiefelMap<Retraction::qr>{});
  }
}

template <class R>
void run_as(const Job& job, const Pass& pass) {
  const Dynamic size{int(job.geometry->n), int(job.geometry->p)};
  with_map(job, [&](auto map) { Lanes<R, decltype(map), Dynamic>(job, size).run(pass); });
}

}  // namespace

void run_any_size(const Job& job, const Pass& pass) {
  return job.storage == Storage::float64 ? run_as<double>(job, pass) : run_as<float>(job, pass);
}

bool is_finite(const Job& job, int64_t k) {
  return job.storage == Storage::float64 ? is_finite_as<double>(job, k) : is_finite_as<float>(job, k);
}

double run_alone(const Job& job, int64_t k, const double* step) {
  return with_map(job, [&](auto map) {
    using Map = decltype(map);
    return job.storage == Storage::float64 ? alone<double, Map>(job, k, step) : alone<float, Map>(job, k, step);
  });
}

}  // namespace MK_ISA
}  // namespace mk
