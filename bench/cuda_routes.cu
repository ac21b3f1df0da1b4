// The way of contiguous float32 weights with momentum through the kernels for small matrices, by itself: what kernels
// read from tables is constant here, so that nvcc leaves out all other ways and cuda_routes.py can count this one.
#include "cuda/small.cuh"

namespace mk {
namespace cuda {
namespace {

// One block's worth of `small`, one norm a matrix: what small() does, without what other groups need.
template <class Map, int N, int P, Pass pass>
__global__ void __launch_bounds__(small_threads(N* P), small_blocks<float, Map>(N* P, pass))
    route(Tables given, Retraction retraction) {
  MK_SHARED(char, shared);
  constexpr int threads = small_threads(N * P);
  Group group = given.groups[0];
  group.rule = Rule::fg_sgd;
  group.manifold = ManifoldCode::stiefel;  // any but Euclidean
  group.retraction = retraction;
  group.parameter = group.hyper = group.geometry = 0;
  group.storage = Storage::float32;
  group.first = group.partials = 0;
  group.individual = group.bounded = group.in_order = group.packed = true;
  group.listed = group.split = group.in_lanes = false;
  Hyper hyper = given.hyper[0];
  hyper.momentum = 0.9;
  hyper.nesterov = hyper.maximize = hyper.curvature = 0;
  Tensor tensor = given.tensors[0];
  __builtin_assume(threadIdx.x < threads);
  __builtin_assume(tensor.momentum != nullptr);
  __builtin_assume((reinterpret_cast<uintptr_t>(tensor.weight) & 15) == 0);
  __builtin_assume((reinterpret_cast<uintptr_t>(tensor.grad) & 15) == 0);
  __builtin_assume((reinterpret_cast<uintptr_t>(tensor.momentum) & 15) == 0);
  Addressing geometry = given.geometries[0];
  geometry.batch_dims = 1;
  int64_t steps = 1;
  const Tile tile{int64_t(blockIdx.x) * threads, 0, threads, 0, false};
  Tables t = given;
  t.groups = &group;
  t.hyper = &hyper;
  t.tensors = &tensor;
  t.geometries = &geometry;
  t.steps = &steps;
  t.norms = nullptr;
  t.grad_scale = t.found_inf = nullptr;
  const Small<float, Map, N, P, pass> work(t, tile, shared);
  work.run(0);
}

#define MK_ROUTE(N, P, ...) template __global__ void route<__VA_ARGS__, N, P, Pass::step>(Tables, Retraction);
#define MK_SQUARE(N)                \
  MK_ROUTE(N, N, SphereMap<false>)  \
  MK_ROUTE(N, N, ObliqueMap<false>) \
  MK_ROUTE(N, N, StiefelMap<Retraction::qr>)
MK_SQUARE(2)
MK_SQUARE(3)
MK_SQUARE(4)
MK_SQUARE(5)
MK_SQUARE(7)
MK_ROUTE(6, 6, StiefelMap<Retraction::qr>)
MK_ROUTE(8, 8, StiefelMap<Retraction::qr>)

}  // namespace
}  // namespace cuda
}  // namespace mk
