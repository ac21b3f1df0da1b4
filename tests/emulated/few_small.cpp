// In place of csrc/cuda/small_*.cu under sanitizers, with which all of those would compile for an hour: one of each way
// that a block of small matrices can be laid out and stepped. Sizes that are not here take the kernels of vectors and
// matrices.
#include "cuda/add_small.cuh"

namespace mk {
namespace cuda {
namespace {

template <class R, class Map, int N, int P>
void add(std::vector<Kernel>& table, ManifoldCode manifold, Retraction retraction) {
  add_small<R, Map, N, P, Pass::measure>(table, manifold, Retraction::add);
  add_small<R, Map, N, P, Pass::step>(table, manifold, retraction);
}

}  // namespace

// Odd and even numbers of elements, with and without padding between matrices; 128 and 64 threads.
void add_small_stiefel(std::vector<Kernel>& table) {
  using Map = StiefelMap<Retraction::qr>;
  add<float, Map, 3, 3>(table, ManifoldCode::stiefel, Retraction::qr);
  add<float, Map, 3, 2>(table, ManifoldCode::stiefel, Retraction::qr);
  add<float, Map, 7, 7>(table, ManifoldCode::stiefel, Retraction::qr);
  add<double, Map, 3, 3>(table, ManifoldCode::stiefel, Retraction::qr);
}

void add_small_stiefel_others(std::vector<Kernel>& table) {
  add_small<float, StiefelMap<Retraction::polar>, 3, 3, Pass::step>(table, ManifoldCode::stiefel, Retraction::polar);
  add_small<float, StiefelMap<Retraction::exp>, 3, 3, Pass::step>(table, ManifoldCode::stiefel, Retraction::exp);
}

void add_small_vectors(std::vector<Kernel>& table) {
  add<float, SphereMap<false>, 3, 3>(table, ManifoldCode::sphere, Retraction::projection);
  add<float, SphereMap<false>, 4, 4>(table, ManifoldCode::sphere, Retraction::projection);
  add<float, ObliqueMap<true>, 3, 3>(table, ManifoldCode::oblique, Retraction::exp);
}

}  // namespace cuda
}  // namespace mk
