// Kernels for Stiefel matrices with the QR retraction: in float all sizes to 8 x 8, in double those that registers
// hold.
#include "cuda/add_small.cuh"

namespace mk {
namespace cuda {
namespace {

template <class R, int N, int P>
void add(std::vector<Kernel>& table) {
  using Map = StiefelMap<Retraction::qr>;
  add_small<R, Map, N, P, Pass::measure>(table, ManifoldCode::stiefel, Retraction::add);
  add_small<R, Map, N, P, Pass::step>(table, ManifoldCode::stiefel, Retraction::qr);
}

template <class R, int N, int P, int Largest>
void add_all(std::vector<Kernel>& table) {
  add<R, N, P>(table);
  if constexpr (P < N) {
    add_all<R, N, P + 1, Largest>(table);
  } else if constexpr (N < Largest) {
    add_all<R, N + 1, 2, Largest>(table);
  }
}

}  // namespace

void add_small_stiefel(std::vector<Kernel>& table) {
  add_all<float, 2, 2, 8>(table);
  add_all<double, 2, 2, 5>(table);
}

}  // namespace cuda
}  // namespace mk
