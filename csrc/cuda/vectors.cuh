// FG-SGD on vectors, one to a team of threads: longer spheres, the columns of larger oblique matrices, and Euclidean
// components with a step size of their own.
//
// Sums are taken in double, and the norm of the projection and the norm after the step follow from <w,w>, <w,d>, <d,d>
// in closed form; where that would cancel they are measured.
#pragma once

#include "cuda/spans.cuh"
#include "manifolds/sphere.h"

namespace mk {
namespace cuda {

// What is kept of a vector between its norm and its step.
struct State {
  double qq, qm, square;  // <q,q>, <q,d>, ||xi||^2 on the unit sphere; square is NaN where the vector stays
  double unit;            // d is in units of it
};
static_assert(sizeof(State) == state_numbers * sizeof(double));

template <class R, class T>
class Vector {
  const Tables& t;
  const Group& g;
  const Rules<R>& rules;
  const Span<R, T> span;
  const bool flat;  // Euclidean: nothing is projected or normalised
  const R scale;
  bool stored;  // the buffer holds the new momentum

  // Calls f(w, d, new buffer) over the elements; with Write, stores w and the buffer as flags say.
  template <bool Write, class F>
  MK_DEVICE void each(R inverse_unit, bool write_weight, bool write_momentum, const F& f) const {
    const Momentum<R>& momentum = rules.momentum;
    const bool read_grad = !stored || !momentum.buffer_is_direction();
    const bool read_momentum = momentum.buffered && (stored || !momentum.first);
    span.template each<Write>(read_grad, read_momentum, write_weight, write_momentum && momentum.buffered,
                              [&](int64_t, R& w, R grad, R& m, auto s) {
                                grad = read_grad ? rules.gradient(w, grad) : R(0);
                                R kept = grad;
                                if (momentum.buffered)
                                  kept = stored ? m : as_stored<decltype(s)>(momentum.buffer(grad, m));
                                // In units of `unit` before they are added, so that nothing overflows.
                                const R d = momentum.direction(grad * inverse_unit, kept * inverse_unit);
                                f(w, d, kept, grad);
                                m = kept;
                              });
  }

  // Sums over all elements, with d in the given unit.
  MK_DEVICE void sum(const Unit<R>& unit, double& ww, double& wd, double& dd, uint32_t& top) const {
    ww = wd = dd = 0;
    top = 0;
    const bool ahead = rules.momentum.buffered && rules.momentum.nesterov;
    each<false>(unit.inverse, false, false, [&](R w, R d, R kept, R grad) {
      ww = fma(double(w), double(w), ww);
      wd = fma(double(w), double(d), wd);
      dd = fma(double(d), double(d), dd);
      top = larger(top, magnitude(flat ? d : kept));
      if (ahead) top = larger(top, magnitude(grad));
      if (magnitude(w) >= Range<R>::beyond) top = Range<R>::beyond;
    });
    top = T::largest(top);
    ww = T::sum(ww);
    wd = T::sum(wd);
    dd = T::sum(dd);
  }

  // ||d - qm q||^2 element by element.
  MK_DEVICE double tangent_square(const Unit<R>& unit, double qm) const {
    const R inverse = R(1) / scale, inner = R(qm);
    double square = 0;
    each<false>(unit.inverse, false, false, [&](R w, R d, R, R) {
      const R x = sphere::rgrad(w * inverse, d, inner);
      square = fma(double(x), double(x), square);
    });
    return T::sum(square);
  }

 public:
  MK_DEVICE Vector(const Tables& t, const Group& g, const Rules<R>& rules, int64_t number)
      : t(t),
        g(g),
        rules(rules),
        span(t, g, number),
        flat(g.manifold == ManifoldCode::euclidean),
        scale(flat ? R(1) : span.scale()),
        stored(false) {}

  MK_DEVICE State measure(bool store_momentum) const {
    Unit<R> unit;
    double ww, wd, dd;
    uint32_t top;
    sum(unit, ww, wd, dd, top);
    if (top >= Range<R>::beyond) return {0, 0, double(__builtin_nan("")), 1};
    if (!flat && !(dd <= double(Limits<R>::huge_square))) {
      unit = Unit<R>(top);
      sum(unit, ww, wd, dd, top);
    }
    State state{1, 0, dd, double(unit.size)};
    if (!flat) {
      const double s = double(scale);
      state.qq = ww / (s * s);
      state.qm = wd / s;
      // ||d - qm q||^2 = dd - qm^2 (2 - qq) cancels where d is nearly radial.
      state.square = dd - state.qm * state.qm * (2 - state.qq);
      if (state.square < dd * (sizeof(R) == 4 ? 1e-6 : 0.25)) state.square = tangent_square(unit, state.qm);
    }
    if (store_momentum && rules.momentum.buffered) each<true>(unit.inverse, false, true, [](R, R, R, R) {});
    return state;
  }

  // W <- R_W(-rate xi); `momentum_stored`: by an earlier launch, else it is stored here.
  MK_DEVICE void step(const State& state, double rate, bool momentum_stored) {
    stored = momentum_stored && rules.momentum.buffered;
    const R inverse_unit = R(1) / R(state.unit);
    if (flat) {
      const R minus_rate = R(-rate);
      each<true>(inverse_unit, true, !stored, [&](R& w, R d, R, R) { w = fma(d, minus_rate, w); });
      return;
    }
    const double s = double(scale), norm = sqrt(state.square),
                 longest = double(longest_step<R>(Retraction::projection));
    double length = rate * state.unit / s;
    if (!(length * norm <= longest)) length = longest / norm;
    const auto arc = g.retraction == Retraction::exp ? sphere::exp(-length, state.square) : sphere::projection(-length);
    const double after =
        arc.a * arc.a * state.qq + 2 * arc.a * arc.b * state.qm * (1 - state.qq) + arc.b * arc.b * state.square;
    const double inverse = after > 0 ? 1 / sqrt(after) : 1;
    // s (a q + b (d - qm q)) / norm as one combination of w and d.
    const R alpha = R((arc.a - arc.b * state.qm) * inverse), beta = R(s * arc.b * inverse);
    R factor = R(1);
    // Where the radial part of d is long against the result, the combination cancels: measure it and normalise once
    // more.
    if (abs(arc.b * state.qm) > 0.5) {
      double square = 0;
      each<false>(inverse_unit, false, false, [&](R w, R d, R, R) {
        const R x = fma(w, alpha, d * beta);
        square = fma(double(x), double(x), square);
      });
      square = T::sum(square);
      if (square > 0) factor = R(s / sqrt(square));
    }
    each<true>(inverse_unit, true, !stored, [&](R& w, R d, R, R) { w = fma(w, alpha, d * beta) * factor; });
  }
};

// The vectors of a tile, and what their group asks of them.
template <class R, class T>
class Vectors {
  static constexpr int teams = block_threads / T::size;
  const Tables& t;
  const Group& g;
  const Tile& tile;
  const Rules<R> rules;
  const bool columns;
  const int64_t per_component, vectors;  // columns that are cut into tiles are on their own here

 public:
  MK_DEVICE Vectors(const Tables& t, const Tile& tile)
      : t(t),
        g(t.groups[tile.group]),
        tile(tile),
        rules(t, g),
        columns(g.manifold == ManifoldCode::oblique),
        per_component(columns && !g.split ? t.geometries[g.geometry].p : 1),
        vectors(tile.count * per_component) {}

  MK_DEVICE State& state_of(int64_t vector) const { return reinterpret_cast<State*>(t.states)[g.state + vector]; }
  MK_DEVICE int64_t number(int64_t i) const { return tile.first * per_component + i; }

  // f(i) over the vectors of this thread's team.
  template <class F>
  MK_DEVICE void each(const F& f) const {
    for (int64_t i = T::number(); i < vectors; i += teams) f(i);
  }

  // The squares of all vectors, summed over those that step, by all threads; NaN where a tile of a matrix that moves as
  // a whole has to stay. Their states go to memory where `keep` says so; else a team has one vector, with the state
  // `own`.
  MK_DEVICE double measure(bool keep, bool store_momentum, State* own) const {
    double sum = 0;
    bool stays = false;
    each([&](int64_t i) {
      const State state = Vector<R, T>(t, g, rules, number(i)).measure(store_momentum);
      *own = state;
      if (keep && T::rank() == 0) state_of(number(i)) = state;
      const bool moves = state.square == state.square;
      stays = stays || !moves;
      if (T::rank() == 0 && moves && per_component == 1) sum += state.square * state.unit * state.unit;
    });
    if (g.split) return __syncthreads_or(stays) ? double(__builtin_nan("")) : Block::sum(sum);
    if (per_component > 1) {
      __syncthreads();  // a component stays where any column of it does
      each([&](int64_t i) {
        const State& state = state_of(number(i));
        if (moves(number(i)) && T::rank() == 0) sum += state.square * state.unit * state.unit;
      });
    }
    return Block::sum(sum);
  }

  // Whether the component of a vector steps, from the states of its columns in memory.
  MK_DEVICE bool moves(int64_t vector) const {
    const int64_t first = vector / per_component * per_component;
    bool stays = false;
    for (int64_t j = T::rank(); j < per_component; j += T::size) {
      const double square = state_of(first + j).square;
      stays = stays || !(square == square);
    }
    return !T::any(stays);
  }

  // The first of two launches: the sum of the tile, by all threads.
  MK_DEVICE double first() const {
    State own;
    const double sum = measure(true, !columns, &own);
    if (!columns) {
      each([&](int64_t i) {
        if (T::rank() == 0 && !(state_of(number(i)).square >= 0)) count_nonfinite(t, g, 1);
      });
    }
    return sum;
  }

  // The steps of the tile; `square`: of the group, where there was a first launch.
  MK_DEVICE void second(double square) const {
    const StepSize<double> step_size = step_size_of<double>(t, g);
    const bool before = g.partials != 0, of_block = before || tile.alone || columns;
    State own{};
    if (!before) square = measure(columns, false, &own);
    if (g.split && !(square == square)) {
      if (threadIdx.x == 0 && tile.first == 0) {
        count_nonfinite(t, g, 1);
        if (t.norms) t.norms[g.norm] = g.individual ? square : 0;
      }
      return;
    }
    const bool by_component = g.individual && columns && !g.split;
    if (by_component) {
      const bool stays = !moves(number(0));
      if (t.norms && threadIdx.x == 0) t.norms[g.norm + tile.first] = stays ? double(__builtin_nan("")) : sqrt(square);
    } else if (t.norms && g.norm >= 0 && (before || tile.alone) && threadIdx.x == 0 && tile.first == 0) {
      t.norms[g.norm] = sqrt(square);
    }
    const double shared_rate = step_size(square);
    each([&](int64_t i) {
      Vector<R, T> vector(t, g, rules, number(i));
      const State state = before || columns ? state_of(number(i)) : own;
      const bool steps = g.split || (per_component > 1 ? moves(number(i)) : state.square == state.square);
      double rate = shared_rate;
      if (!of_block) {
        const double norm_square = state.square * state.unit * state.unit;
        if (g.bounded) rate = step_size(norm_square);
        if (t.norms && g.individual && T::rank() == 0)
          t.norms[g.norm + number(i)] = steps ? sqrt(norm_square) : double(__builtin_nan(""));
      }
      if (steps) vector.step(state, rate, before && !columns);
      if (!steps && T::rank() == 0 && number(i) % per_component == 0 && (columns || !before)) count_nonfinite(t, g, 1);
    });
  }
};

template <class R, class T, Pass pass>
__global__ void __launch_bounds__(block_threads, 2) vectors(Tables t, const Tile* tiles) {
  if (is_skipped(t)) return;
  const Tile tile = tiles[blockIdx.x];
  const Vectors<R, T> work(t, tile);
  if constexpr (pass == Pass::measure) {
    const double sum = work.first();
    if (threadIdx.x == 0) t.partials[tile.partial] = sum;
  } else {
    const Group& g = t.groups[tile.group];
    work.second(g.partials ? total_of(t, g) : 0);
  }
}

}  // namespace cuda
}  // namespace mk
