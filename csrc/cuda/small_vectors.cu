// Kernels for spheres and oblique matrices of the sizes that convolutions have: those that registers hold, which two
// times 49 doubles are not.
#include "cuda/add_small.cuh"

namespace mk {
namespace cuda {
namespace {

template <class R, template <bool> class Map, int N, int P>
void add(std::vector<Kernel>& table, ManifoldCode manifold) {
  if constexpr (sizeof(R) == 4 || N * P <= 25) {
    add_small<R, Map<false>, N, P, Pass::measure>(table, manifold, Retraction::add);
    add_small<R, Map<false>, N, P, Pass::step>(table, manifold, Retraction::projection);
    add_small<R, Map<true>, N, P, Pass::step>(table, manifold, Retraction::exp);
  }
}

}  // namespace

void add_small_vectors(std::vector<Kernel>& table) {
#define MK_ADD(N, P)                                          \
  add<float, SphereMap, N, P>(table, ManifoldCode::sphere);   \
  add<float, ObliqueMap, N, P>(table, ManifoldCode::oblique); \
  add<double, SphereMap, N, P>(table, ManifoldCode::sphere);  \
  add<double, ObliqueMap, N, P>(table, ManifoldCode::oblique);
  MK_FIXED_SIZES(MK_ADD)
#undef MK_ADD
}

}  // namespace cuda
}  // namespace mk
