// Rows of the table for small.cuh.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/small.cuh"

namespace mk {
namespace cuda {

template <class R, class Map, int N, int P, Pass pass>
void add_small(std::vector<Kernel>& table, ManifoldCode manifold, Retraction retraction) {
  table.push_back({{.engine = Engine::small,
                    .wide = sizeof(R) == 8,
                    .pass = pass,
                    .manifold = manifold,
                    .retraction = retraction,
                    .n = N,
                    .p = P},
                   small_threads(N * P),
                   small_shared<R>(N * P),
                   start<small<R, Map, N, P, pass>>});
}

}  // namespace cuda
}  // namespace mk
