#include "cuda/launch.cuh"
#include "cuda/vectors.cuh"

namespace mk {
namespace cuda {
namespace {

template <class R, int Threads, Pass pass>
void add(std::vector<Kernel>& table) {
  table.push_back({{.engine = Engine::vectors, .wide = sizeof(R) == 8, .pass = pass, .team = Threads},
                   block_threads,
                   0,
                   start<vectors<R, Team<Threads>, pass>>});
}

template <class R, int Threads>
void add_both(std::vector<Kernel>& table) {
  add<R, Threads, Pass::measure>(table);
  add<R, Threads, Pass::step>(table);
}

}  // namespace

void add_vectors(std::vector<Kernel>& table) {
  add_both<float, 8>(table);
  add_both<float, 32>(table);
  add_both<float, block_threads>(table);
  add_both<double, 8>(table);
  add_both<double, 32>(table);
  add_both<double, block_threads>(table);
}

}  // namespace cuda
}  // namespace mk
