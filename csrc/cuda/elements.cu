#include "cuda/elements.cuh"
#include "cuda/launch.cuh"

namespace mk {
namespace cuda {
namespace {

// The last launch of a step: parameters with a gradient are a step further.
__global__ void __launch_bounds__(block_threads) advance(Tables t, const Tile*) {
  if (is_skipped(t)) return;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < t.parameters;
       i += int64_t(gridDim.x) * blockDim.x)
    t.steps[i] += t.taken[i];
}

template <class R, Pass pass>
void add(std::vector<Kernel>& table) {
  table.push_back(
      {{.engine = Engine::elements, .wide = sizeof(R) == 8, .pass = pass}, block_threads, 0, start<elements<R, pass>>});
}

}  // namespace

void add_elements(std::vector<Kernel>& table) {
  add<float, Pass::measure>(table);
  add<float, Pass::step>(table);
  add<double, Pass::measure>(table);
  add<double, Pass::step>(table);
  table.push_back({{.engine = Engine::advance}, block_threads, 0, start<advance>});
}

}  // namespace cuda
}  // namespace mk
