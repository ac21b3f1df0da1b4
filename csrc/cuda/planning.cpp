#include "cuda/planning.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "cuda/limits.h"

namespace mk {
namespace cuda {
namespace {

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of a Euclidean tile.
constexpr int64_t tile_elements = 4096;
// A group that is measured has at most so many sums, which every block of the second launch adds up.
constexpr int64_t most_partials = 1024;

// A group's tiles, `unit` vectors or matrices at a time, are as long as that bound demands.
int64_t tile_size(int64_t count, int64_t unit, bool measured) {
  return measured ? unit * divided_up(count, unit * most_partials) : unit;
}

// Element e of a component at e, row after row.
bool rows_in_order(const Geometry& g) {
  int64_t next = 1;
  for (int d = g.dims - 1; d >= g.batch_dims; d--) {
    if (g.weight_stride[d] != next || g.grad_stride[d] != next) return false;
    next *= g.size[d];
  }
  return true;
}

// Component k at k times the number of its elements.
bool components_in_order(const Geometry& g) {
  return g.batch_dims == 0 ||
         (g.batch_dims == 1 && g.weight_stride[0] == g.elements() && g.grad_stride[0] == g.elements());
}

// From the first element of a component to the farthest one in memory.
int64_t reach(const Geometry& g) {
  int64_t farthest = 0;
  for (int d = g.batch_dims; d < g.dims; d++)
    farthest += (g.size[d] - 1) * std::max(g.weight_stride[d], g.grad_stride[d]);
  return farthest;
}

std::vector<int64_t> offsets_of_elements(const Geometry& g, const int64_t* stride) {
  std::vector<int64_t> offsets{0};
  for (int d = g.batch_dims; d < g.dims; d++) {
    std::vector<int64_t> next;
    for (const int64_t offset : offsets)
      for (int64_t k = 0; k < g.size[d]; k++) next.push_back(offset + k * stride[d]);
    offsets = std::move(next);
  }
  return offsets;
}

}  // namespace

int32_t Planner::add_geometry(const Geometry& geometry) {
  Addressing addressing{};
  static_cast<Geometry&>(addressing) = geometry;
  for (int d = 0; d < geometry.dims; d++) addressing.inverse[d] = 1.0 / double(geometry.size[d]);
  addressing.inverse_elements = 1.0 / double(std::max<int64_t>(geometry.elements(), 1));
  geometries.push_back(addressing);
  return int32_t(geometries.size()) - 1;
}

// Without a bound on the step size nothing depends on the norm but a caller who asks.
bool Planner::needs_norm(const Group& g) const {
  return g.rule == Rule::fg_sgd && (g.bounded || norms) && !g.individual;
}

bool Planner::add_group(Group g) {
  const Geometry geometry = geometries[size_t(g.geometry)];
  switch (g.manifold) {
    case ManifoldCode::euclidean:
      if (geometry.count == 1 || (!g.bounded && !(norms && g.individual && g.rule == Rule::fg_sgd))) {
        add_elements(g, geometry);
      } else {
        add_vectors(g, geometry, Engine::vectors);
      }
      return true;
    case ManifoldCode::scale_invariant:
      add_vectors(g, geometry, Engine::scale_invariant);
      return true;
    case ManifoldCode::grassmann:
      add_vectors(g, geometry, Engine::grassmann);
      return true;
    case ManifoldCode::stiefel:
      return add_small(g, geometry) || add_matrices(g, geometry);
    default:
      if (!add_small(g, geometry)) add_vectors(g, geometry, Engine::vectors);
      return true;
  }
}

void Planner::add_elements(Group g, const Geometry& geometry) {
  g.packed = !g.listed && (geometry.count == 1 ? geometry.dense : geometry.dense && components_in_order(geometry));
  const Key key{.engine = Engine::elements, .wide = g.storage == Storage::float64};
  const bool measured = g.rule == Rule::fg_sgd && (g.bounded || norms);
  cut(g, key, 0, g.count * geometry.elements(), tile_size(g.count * geometry.elements(), tile_elements, measured), true,
      measured);
}

void Planner::describe_elements(Group& g, const Geometry& geometry) {
  g.in_order = rows_in_order(geometry);
  g.packed = g.in_order && !g.listed && components_in_order(geometry);
  g.in_lanes = geometry.batch_dims > 0 && geometry.weight_stride[geometry.batch_dims - 1] == 1;
  g.weight_offset = int64_t(element_offsets.size());
  const auto weight = offsets_of_elements(geometry, geometry.weight_stride);
  element_offsets.insert(element_offsets.end(), weight.begin(), weight.end());
  g.grad_offset = int64_t(element_offsets.size());
  const auto grad = offsets_of_elements(geometry, geometry.grad_stride);
  element_offsets.insert(element_offsets.end(), grad.begin(), grad.end());
}

bool Planner::add_small(Group& g, const Geometry& geometry) {
  // Threads keep the offsets of a component's elements in 32 bits.
  if (geometry.elements() > 64 || reach(geometry) > std::numeric_limits<int32_t>::max()) return false;
  Key key{.engine = Engine::small,
          .wide = g.storage == Storage::float64,
          .pass = Pass::step,
          .manifold = g.manifold,
          .retraction = g.retraction,
          .n = int(geometry.n),
          .p = int(geometry.p)};
  const Kernel* kernel = find(key);
  if (kernel == nullptr || kernel->shared > shared_limit) return false;
  describe_elements(g, geometry);
  const bool measured = needs_norm(g);
  g.state = left_out;
  if (measured) left_out += g.count;
  cut(g, key, kernel->shared, g.count, tile_size(g.count, kernel->threads, measured), true, measured);
  return true;
}

void Planner::add_vectors(Group g, const Geometry& geometry, Engine engine) {
  const bool columns = g.manifold == ManifoldCode::oblique;
  const int64_t length = columns ? geometry.n : geometry.elements();
  const int team = length <= short_vector_elements ? 8 : length <= warp_vector_elements ? 32 : block_threads;
  const int64_t teams = block_threads / team;
  const bool fg = engine == Engine::vectors;
  const bool measured = fg && needs_norm(g);
  const Key key{.engine = engine, .wide = g.storage == Storage::float64, .team = team};
  g.packed = (columns ? geometry.dense_columns : geometry.dense);
  g.state = states;
  if (!columns) {
    if (measured) states += g.count;
    return cut(g, key, 0, g.count, tile_size(g.count, teams, measured), true, measured);
  }
  states += g.count * geometry.p;
  if (geometry.count == 1) {
    // The columns of one matrix, over as many tiles as there are: it moves as a whole or stays, which all have to know.
    g.split = true;
    return cut(g, key, 0, geometry.p, tile_size(geometry.p, teams, true), true, true);
  }
  // Whole components: one, or as many as there are teams for.
  const int64_t unit = g.individual ? 1 : std::max<int64_t>(1, teams / geometry.p);
  cut(g, key, 0, g.count, tile_size(g.count, unit, measured), true, measured);
}

bool Planner::add_matrices(Group& g, const Geometry& geometry) {
  const bool wide = g.storage == Storage::float64;
  const int team = geometry.n <= warp_matrix_rows ? 32 : block_threads;
  const size_t number = wide ? sizeof(double) : sizeof(float);
  const int64_t teams = block_threads / team;
  const size_t shared = size_t(teams) * number * size_t(matrix_numbers(g.retraction, geometry.n, geometry.p));
  if (geometry.n > block_matrix_rows || shared > shared_limit) return false;
  describe_elements(g, geometry);
  const bool measured = needs_norm(g);
  g.state = left_out;
  if (measured) left_out += g.count;
  const Key key{.engine = Engine::matrices, .wide = wide, .team = team};
  cut(g, key, shared, g.count, tile_size(g.count, teams, measured), true, measured);
  return true;
}

void Planner::cut(Group g, Key key, size_t shared, int64_t units, int64_t per_tile, bool alone_if_one, bool measured) {
  Key measure_key = key;
  measure_key.pass = Pass::measure;
  measure_key.retraction = Retraction::add;
  key.pass = Pass::step;
  const bool fg = key.engine != Engine::scale_invariant && key.engine != Engine::grassmann;
  const int64_t tiles = divided_up(units, per_tile);
  const bool alone = measured && tiles == 1 && alone_if_one;
  const bool twice = fg && measured && !alone;
  const Kernel *step = find(key), *measure = twice ? find(measure_key) : nullptr;
  if (step == nullptr || (twice && measure == nullptr))
    throw std::logic_error("manifold_kernels: no kernel for a group");
  g.partial = partials;
  g.partials = twice ? tiles : 0;
  for (int64_t i = 0; i < tiles; i++) {
    const Tile tile{i * per_tile, partials + i, int32_t(std::min(per_tile, units - i * per_tile)),
                    int32_t(groups.size()), alone};
    if (twice) add_tile(measures, measure, shared, tile);
    add_tile(steps, step, shared, tile);
  }
  partials += g.partials;
  groups.push_back(g);
}

void Planner::add_tile(std::vector<Launch>& launches, const Kernel* kernel, size_t shared, const Tile& tile) {
  auto at = std::find_if(launches.begin(), launches.end(), [&](const Launch& l) { return l.kernel == kernel; });
  if (at == launches.end()) at = launches.insert(launches.end(), Launch{kernel, 0, {}});
  at->shared = std::max(at->shared, shared);
  at->tiles.push_back(tile);
}

std::vector<Launch> Planner::launches() const {
  std::vector<Launch> all = measures;
  all.insert(all.end(), steps.begin(), steps.end());
  return all;
}

}  // namespace cuda
}  // namespace mk
