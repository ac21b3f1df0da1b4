// Kernels for Stiefel matrices with the other retractions, of the sizes that are common.
#include "cuda/add_small.cuh"

namespace mk {
namespace cuda {
namespace {

template <class R, Retraction retraction, int N, int P>
void add(std::vector<Kernel>& table) {
  add_small<R, StiefelMap<retraction>, N, P, Pass::step>(table, ManifoldCode::stiefel, retraction);
}

}  // namespace

void add_small_stiefel_others(std::vector<Kernel>& table) {
#define MK_ADD(N, P)                            \
  add<float, Retraction::polar, N, P>(table);   \
  add<float, Retraction::cayley, N, P>(table);  \
  add<float, Retraction::exp, N, P>(table);     \
  add<double, Retraction::polar, N, P>(table);  \
  add<double, Retraction::cayley, N, P>(table); \
  add<double, Retraction::exp, N, P>(table);
  MK_ADD(2, 2)
  MK_ADD(3, 3)
#undef MK_ADD
}

}  // namespace cuda
}  // namespace mk
