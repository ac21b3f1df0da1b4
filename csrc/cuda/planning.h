// From the groups of a plan to launches: which kernel takes which group, in what tiles. It depends on the plan and on
// how tensors lie in memory, not on what they hold, so that it is done once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/kernels.h"

namespace mk {
namespace cuda {

struct Launch {
  const Kernel* kernel;
  size_t shared;
  std::vector<Tile> tiles;
};

class Planner {
 public:
  // `shared_limit`: the dynamic shared memory that a block may have. `norms`: whether R is asked for.
  Planner(size_t shared_limit, bool norms) : shared_limit(shared_limit), norms(norms) {}

  // The number of a geometry in the tables.
  int32_t add_geometry(const Geometry&);

  // Finds kernels for a group; false where torch's linear algebra is to step it. Of `group`, what the plan says is
  // filled in.
  bool add_group(Group group);

  // Launches in order: norms of groups first.
  std::vector<Launch> launches() const;

  std::vector<Group> groups;
  std::vector<Addressing> geometries;
  std::vector<int64_t> element_offsets;
  int64_t partials = 0, states = 0, left_out = 0;

 private:
  const size_t shared_limit;
  const bool norms;
  std::vector<Launch> measures, steps;

  bool needs_norm(const Group&) const;
  void add_elements(Group, const Geometry&);
  bool add_small(Group&, const Geometry&);
  void add_vectors(Group, const Geometry&, Engine);
  bool add_matrices(Group&, const Geometry&);
  void describe_elements(Group&, const Geometry&);
  void cut(Group, Key, size_t shared, int64_t units, int64_t per_tile, bool alone_if_one, bool needs_norm);
  static void add_tile(std::vector<Launch>&, const Kernel*, size_t shared, const Tile&);
};

}  // namespace cuda
}  // namespace mk
