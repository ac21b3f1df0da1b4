#include "cuda/kernels.h"

#include <algorithm>

namespace mk {
namespace cuda {

std::string Kernel::name() const {
  static const char* const engines[] = {"elements",  "small",    "vectors", "scale_invariant",
                                        "grassmann", "matrices", "advance"};
  static const char* const manifolds[] = {"euclidean", "sphere", "oblique", "stiefel"};
  static const char* const retractions[] = {"", " projection", " qr", " polar", " cayley", " exp"};
  std::string name = engines[int(key.engine)];
  if (key.engine == Engine::small)
    name += std::string(" ") + manifolds[int(key.manifold)] + retractions[int(key.retraction)] + " " +
            std::to_string(key.n) + "x" + std::to_string(key.p);
  if (key.team) name += " " + std::to_string(key.team);
  if (key.engine == Engine::advance) return name;
  return name + (key.wide ? " double" : " float") + (key.pass == Pass::measure ? " measure" : " step");
}

const std::vector<Kernel>& kernels() {
  static const std::vector<Kernel> all = [] {
    std::vector<Kernel> table;
    add_elements(table);
    add_small_vectors(table);
    add_small_stiefel(table);
    add_small_stiefel_others(table);
    add_vectors(table);
    add_scale_invariant(table);
    add_grassmann(table);
    add_matrices(table);
    return table;
  }();
  return all;
}

const Kernel* find(const Key& key) {
  const auto& all = kernels();
  const auto found = std::find_if(all.begin(), all.end(), [&](const Kernel& k) { return k.key == key; });
  return found == all.end() ? nullptr : &*found;
}

}  // namespace cuda
}  // namespace mk
