// Kernels of the rules for rows: a row of a group to a team of threads, each on its own.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/spans.cuh"

namespace mk {
namespace cuda {

// Row: a class with step(), false where the row stays as it is.
template <class R, class T, template <class, class> class Row>
__global__ void __launch_bounds__(block_threads, 2) rows(Tables t, const Tile* tiles) {
  if (is_skipped(t)) return;
  const Tile tile = tiles[blockIdx.x];
  const Group& g = t.groups[tile.group];
  for (int64_t i = T::number(); i < tile.count; i += block_threads / T::size) {
    const bool stepped = Row<R, T>(t, g, tile.first + i).step();
    if (!stepped && T::rank() == 0) count_nonfinite(t, g, 1);
  }
}

template <template <class, class> class Row>
struct Rows {
  template <class R, int Threads>
  static void add(std::vector<Kernel>& table, Engine engine) {
    table.push_back({{.engine = engine, .wide = sizeof(R) == 8, .pass = Pass::step, .team = Threads},
                     block_threads,
                     0,
                     start<rows<R, Team<Threads>, Row>>});
  }
  static void add_all(std::vector<Kernel>& table, Engine engine) {
    add<float, 8>(table, engine);
    add<float, 32>(table, engine);
    add<float, block_threads>(table, engine);
    add<double, 8>(table, engine);
    add<double, 32>(table, engine);
    add<double, block_threads>(table, engine);
  }
};

}  // namespace cuda
}  // namespace mk
