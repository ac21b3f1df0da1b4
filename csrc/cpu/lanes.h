// Steps of small matrices, one matrix a lane.
//
// Components are taken a tile at a time. Momentum needs no matrix structure: it is updated in the order of memory, with
// a check of the range of all squares; then W and the direction are brought into lanes, and W back. A component whose
// squares leave the range of the arithmetic type is left out of its tile and computed by the same mathematics in the
// next wider type.
#pragma once

#include "cpu/maps.h"
#include "cpu/pass.h"
#include "cpu/tile.h"
#include "cpu/transpose.h"

namespace mk {
namespace MK_ISA {
namespace {

// The roots of up to N squares; a component that is left out of its tile gets its own later.
template <class R>
__attribute__((noinline)) void write_roots(const Pack<R>& square, int count, double* roots) {
  for (int i = 0; i < Pack<R>::lanes && i < count; i++) roots[i] = __builtin_sqrt(double(square.v[i]));
}

// R is the arithmetic type; other storage is converted where a tile is copied.
template <class R, class Map, class Size>
class Lanes {
  using T = Pack<R>;
  static constexpr int N = T::lanes;
  // channels_last tiles are stepped in place at the sizes of size.h; a second body for all others would not pay.
  static constexpr bool is_fixed = !std::is_same<Size, Dynamic>::value;

  const Job& job;
  const Size size;
  const int E;
  const int width;  // components of a tile
  const Momentum<R> momentum;
  const StepSize<R> step_size;
  const bool native;         // storage is R itself
  const bool is_buffer;      // the direction is the buffer as stored; the second pass needs no gradient
  const bool is_gradient;    // the direction is the gradient as stored
  const bool steady;         // the commonest step: buffers exist, nothing is negated, looked ahead or rounded
  const T scale0, inverse0;  // of the first component: of all where they share it
  // Squares of directions up to here take the fast path: nothing overflows, and what is stored in 16 bits stays finite.
  const R largest_square;

  // The tile from k on; `skip` tells components to leave out, which needs a copy.
  Tile<R> tile_at(int64_t k, int64_t end, bool second, const uint8_t* skip,
                  TileMemory<R, Size::capacity>& memory) const {
    Tile<R> t;
    const Run run = run_at(job, k, end);
    t.k = k;
    t.count = int(end - k < width ? end - k : width);
    t.weight_element = job.weight_offset;
    t.grad_element = job.grad_offset;
    const int in_place = int(run.length < t.count ? run.length : t.count) / N * N;
    const bool lanes = is_fixed && run.weight_step == 1 && run.grad_step == 1;
    const bool ordered = run.weight_step == E && run.grad_step == E && job.weight_in_order && job.grad_in_order;
    t.copied = !(native && !skip && in_place > 0 && (lanes || ordered) && (is_buffer || is_gradient));
    t.in_lanes = !t.copied && lanes;
    if (!t.copied) {
      t.count = in_place;
      t.w = static_cast<R*>(job.weight) + run.weight;
      t.g = static_cast<const R*>(job.grad) + run.grad;
      t.m = job.momentum ? static_cast<R*>(job.momentum) + run.weight : nullptr;
      t.d = is_buffer ? t.m : t.g;
      t.direction_element = is_buffer ? t.weight_element : t.grad_element;
      return t;
    }
    t.w = memory.w;
    t.g = memory.g;
    t.m = memory.m;
    t.d = is_buffer ? t.m : t.g;
    const int padded = (t.count + N - 1) / N * N;
    const auto take = [&](void* base, bool grad, R* into) {
      copy<R, Size, false>(job, base, grad, k, t.count, size, skip, into);
      for (int i = t.count * E; i < padded * E; i++) into[i] = R(0);
    };
    take(job.weight, false, memory.w);
    if (!second || !is_buffer) take(const_cast<void*>(job.grad), true, memory.g);
    if (momentum.buffered && (second || !momentum.first)) take(job.momentum, false, memory.m);
    return t;
  }

  // f(offset in g, offset in w and m, sum) over registers full of the tile's elements, in the order of memory. Four
  // sums take turns, so that none waits for its last addition; returns their sum.
  template <class F>
  MK_FN T each(const Tile<R>& t, const F& f) const {
    T a = T(R(0)), b = a, c = a, d = a;
    const int padded = (t.count + N - 1) / N * N, rows = t.in_lanes ? E : 1, row = t.in_lanes ? padded : padded * E;
    for (int e = 0; e < rows; e++) {
      const int64_t grad = t.in_lanes ? t.grad_element[e] : 0, weight = t.in_lanes ? t.weight_element[e] : 0;
      int i = 0;
      for (; i + 4 * N <= row; i += 4 * N) {
        f(grad + i, weight + i, a);
        f(grad + i + N, weight + i + N, b);
        f(grad + i + 2 * N, weight + i + 2 * N, c);
        f(grad + i + 3 * N, weight + i + 3 * N, d);
      }
      for (; i < row; i += N) f(grad + i, weight + i, a);
    }
    return (a + b) + (c + d);
  }

  // The new buffer (the stored one in the second pass), or the gradient where there is none.
  template <class V>
  MK_FN V buffer_at(const Tile<R>& t, bool second, int64_t grad, int64_t weight) const {
    if (second && momentum.buffered) return at<V>(t.m + weight);
    const V gradient = momentum.gradient(V(R(0)), at<V>(t.g + grad));
    if (!momentum.buffered) return gradient;
    return as_stored(job.storage, momentum.buffer(gradient, momentum.first ? V(R(0)) : at<V>(t.m + weight)));
  }

  // Adds the squares of what a step is made of: where their sum is in range, nothing overflows.
  template <class V>
  MK_FN void add_squares(const Tile<R>& t, bool second, int64_t grad, int64_t weight, V& sum) const {
    const V buffer = buffer_at<V>(t, second, grad, weight), w = at<V>(t.w + weight);
    sum = fma(buffer, buffer, fma(w, w, sum));
    if (momentum.nesterov) {
      const V gradient = momentum.gradient(V(R(0)), at<V>(t.g + grad));
      sum = fma(gradient, gradient, sum);
    }
  }

  // For all components of the tile at once.
  MK_FN bool in_range(const Tile<R>& t, bool second) const {
    T sum;
    if (steady && !second) {
      const T mu = T(momentum.momentum), rate = T(momentum.one_minus_dampening);
      const R *g = t.g, *m = t.m, *w = t.w;
      sum = each(t, [=](int64_t grad, int64_t weight, T& sum) {
        const T buffer = fma(T::load(g + grad), rate, T::load(m + weight) * mu), x = T::load(w + weight);
        sum = fma(buffer, buffer, fma(x, x, sum));
      });
    } else {
      sum = each(t, [&](int64_t grad, int64_t weight, T& sum) { add_squares(t, second, grad, weight, sum); });
    }
    return !any(!(sum <= T(largest_square)));
  }

  // Momentum needs no matrix structure: it is updated in the order of memory, and the direction with it.
  MK_FN void update_momentum(const Tile<R>& t, bool second, R* fresh) const {
    if (steady && !second) {
      const T mu = T(momentum.momentum), rate = T(momentum.one_minus_dampening);
      const R* g = t.g;
      R* m = t.m;
      each(t, [=](int64_t grad, int64_t weight, T&) {
        fma(T::load(g + grad), rate, T::load(m + weight) * mu).store(m + weight);
      });
      return;
    }
    if (momentum.buffered && !second)
      each(t, [&](int64_t grad, int64_t weight, T&) { buffer_at<T>(t, false, grad, weight).store(t.m + weight); });
    if (is_buffer || is_gradient) return;
    // Only copies come here (tile_at), so that the gradient's place is free.
    each(t, [&](int64_t grad, int64_t weight, T&) {
      const T gradient = momentum.gradient(T(R(0)), T::load(t.g + grad));
      momentum.direction(gradient, momentum.buffered ? T::load(t.m + weight) : gradient).store(fresh + grad);
    });
  }

  // The matrix part of a tile keeps memory idle: it fetches what the next tile will read.
  template <bool InLanes>
  MK_FN void prefetch_next(const Tile<R>& t, int l, bool second) const {
    constexpr int line = 64 / int(sizeof(R));
    const auto fetch = [&](int64_t weight, int64_t grad) {
      __builtin_prefetch(t.w + weight, 1);
      if (!second || is_gradient) __builtin_prefetch(t.g + grad, 0);
      if (momentum.buffered) __builtin_prefetch(t.m + weight, 1);
    };
    if constexpr (InLanes) {
      for (int e = 0; e < E; e++) fetch(t.weight_element[e] + t.count + l, t.grad_element[e] + t.count + l);
    } else {
      const int64_t here = int64_t(l + t.count) * E;
      for (int e = 0; e < E * N; e += line) fetch(here + e, here + e);
    }
  }

  template <bool InLanes>
  MK_FN void bring(const R* base, const int64_t* element, int l, T* x) const {
    if constexpr (InLanes) {
      for (int e = 0; e < E; e++) x[e] = T::load(base + element[e] + l);
    } else {
      to_lanes(base + int64_t(l) * E, x, size);
    }
  }

  T scale_of(const Tile<R>& t, int l) const {
    R scale[N];
    for (int i = 0; i < N; i++) scale[i] = R(job.scale(t.k + (l + i < t.count ? l + i : 0)));
    return T::load(scale);
  }

  // For each component: the ones to leave out of the tile.
  __attribute__((noinline)) void find_out_of_range(const Tile<R>& t, bool second, uint8_t* out) const {
    for (int i = 0; i < t.count; i++) {
      R sum = R(0);
      for (int e = 0; e < E; e++) {
        const int64_t inside = int64_t(i) * E + e;
        add_squares(t, second, t.in_lanes ? t.grad_element[e] + i : inside,
                    t.in_lanes ? t.weight_element[e] + i : inside, sum);
      }
      out[i] = !(sum <= largest_square);
    }
  }

  // Sums that the first pass keeps over the tiles; Kahan's, so that the length of a chunk costs no accuracy.
  struct Sums {
    T sum = T(R(0)), lost = T(R(0));
    MK_FN void add(T x) {
      const T term = x - lost, next = sum + term;
      lost = (next - sum) - term;
      sum = next;
    }
  };

  // The matrix part of a pass: projection, norm, retraction. `far`: set for components whose step leaves the range;
  // they keep their weight.
  template <bool InLanes>
  MK_FN bool step_tile(const Pass& pass, const Tile<R>& t, Sums& sums, uint8_t* far) const {
    bool all_near = true;
    T scale = scale0, inverse = inverse0;
    for (int l = 0; l < t.count; l += N) {
      T q[Size::capacity], d[Size::capacity], xi[Size::capacity];
      if (job.scale_stride) {
        scale = scale_of(t, l);
        inverse = T(R(1)) / scale;
      }
      if (!t.copied) prefetch_next<InLanes>(t, l, pass.kind == Pass::second);
      bring<InLanes>(t.d, t.direction_element, l, d);
      bring<InLanes>(t.w, t.weight_element, l, q);
      for (int e = 0; e < E; e++) q[e] = q[e] * inverse;
      const T square = Map::project(q, d, xi, size);
      if (pass.kind == Pass::first) {
        sums.add(square);
        continue;
      }
      if (pass.kind == Pass::whole && job.norms) write_roots(square, t.count - l, job.norms + t.k + l);
      const T step = -(pass.kind == Pass::second ? T(pass.step) : step_size(square)) * inverse;
      const auto near = step * step * square <= T(Limits<R>::huge_square);
      Map::retract(q, xi, step, square, size);
      for (int e = 0; e < E; e++) q[e] = q[e] * scale;
      if (any(!near)) {
        bring<InLanes>(t.w, t.weight_element, l, d);
        for (int e = 0; e < E; e++) q[e] = select(near, q[e], d[e]);
        for (int i = 0; i < N && l + i < t.count; i++) far[l + i] = !near.v[i];
        all_near = false;
      }
      if constexpr (InLanes) {
        for (int e = 0; e < E; e++) q[e].store(t.w + t.weight_element[e] + l);
      } else {
        from_lanes(q, t.w + int64_t(l) * E, size);
      }
    }
    return all_near;
  }

 public:
  Lanes(const Job& job, Size size)
      : job(job),
        size(size),
        E(size.n * size.p),
        width(Tile<R>::elements / (E * N) > 0 ? Tile<R>::elements / (E * N) * N : N),
        momentum(momentum_of<R>(job)),
        step_size(step_size_of<R>(job)),
        native(job.storage == (sizeof(R) == 4 ? Storage::float32 : Storage::float64)),
        is_buffer(momentum.buffer_is_direction()),
        is_gradient(!momentum.buffered && momentum.plain),
        steady(is_buffer && !momentum.first && momentum.plain && native),
        scale0(R(job.scales[0])),
        inverse0(T(R(1)) / scale0),
        largest_square(job.storage == Storage::float16 ? R(largest_float16) * R(largest_float16)
                                                       : Limits<R>::huge_square) {}

  void run(const Pass& pass) const {
    const bool first = pass.kind == Pass::first, second = pass.kind == Pass::second;
    TileMemory<R, Size::capacity> memory;
    uint8_t left_out[TileMemory<R, 1>::size], far[TileMemory<R, 1>::size];
    Sums sums;
    double alone_squares = 0;
    for (int64_t k = pass.begin; k < pass.end;) {
      const uint8_t* skip = nullptr;
      Tile<R> t = tile_at(k, pass.end, second, skip, memory);
      if ((second && pass.skipped) || !in_range(t, second)) {
        find_out_of_range(t, second, left_out);
        if (second && pass.skipped)
          for (int i = 0; i < t.count; i++) left_out[i] |= pass.skipped[k + i];
        skip = left_out;
        t = tile_at(k, k + t.count, second, skip, memory);
      }
      for (int i = 0; i < t.count; i++) far[i] = 0;
      update_momentum(t, second, memory.g);
      bool all_near;
      if constexpr (is_fixed) {
        all_near = t.in_lanes ? step_tile<true>(pass, t, sums, far) : step_tile<false>(pass, t, sums, far);
      } else {
        all_near = step_tile<false>(pass, t, sums, far);
      }
      if (t.copied) {
        if (!first) copy<R, Size, true>(job, job.weight, false, k, t.count, size, skip, memory.w);
        if (!second && momentum.buffered)
          copy<R, Size, true>(job, job.momentum, false, k, t.count, size, skip, memory.m);
      }
      if (skip || !all_near) {
        for (int i = 0; i < t.count; i++) {
          const bool out = skip && skip[i];
          if (!(out || far[i]) || (second && pass.skipped && pass.skipped[k + i])) continue;
          // A far component has its momentum already.
          const double stop = __builtin_nan("");
          const double square = run_alone(job, k + i, second || far[i], first ? &stop : second ? &pass.step : nullptr);
          if (pass.kind == Pass::whole && job.norms)
            job.norms[k + i] = square >= 0 ? __builtin_sqrt(square) : __builtin_nan("");
          if (square >= 0) {
            alone_squares += square;
          } else if (!second) {
            pass.out->nonfinite++;
            if (first) pass.newly_skipped[k + i] = 1;
          }
        }
      }
      k += t.count;
    }
    if (first) pass.out->square += total(sums.sum) + alone_squares;
  }
};

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
