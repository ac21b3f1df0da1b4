// Steps of small matrices, one matrix a lane.
//
// Components are taken a tile at a time, and a tile in three rounds over its blocks, a block being a register full of
// matrices: momentum, projection and a check of the range of all numbers; step sizes; retraction. The rounds are long
// chains of dependent operations, and the blocks of a round keep each other's waiting times busy. Nothing of a block is
// written before all of it is known to be in range. If it is not, it is done once more without the components
// concerned, and these by the same mathematics in the next wider type.
#pragma once

#include "cpu/maps.h"
#include "cpu/pass.h"
#include "cpu/tile.h"
#include "cpu/transpose.h"

namespace mk {
namespace MK_ISA {
namespace {

// The roots of the squares of a block's components; one that is left out of its tile gets its own later.
template <class R>
__attribute__((noinline)) void write_roots(const Pack<R>& square, LaneOrder order, int count, double* roots) {
  for (int i = 0; i < Pack<R>::lanes; i++)
    if (order.component<R>(i) < count) roots[order.component<R>(i)] = __builtin_sqrt(double(square.v[i]));
}

// R is the arithmetic type; other storage is converted where a tile is copied.
template <class R, class Map, class Size>
class Lanes {
  using T = Pack<R>;
  static constexpr int N = T::lanes;
  // channels_last tiles are stepped in place at the sizes of size.h; a second body for all others would not pay.
  static constexpr bool is_fixed = !std::is_same<Size, Dynamic>::value;
  static constexpr bool is_linear = Map::template is_linear<Size>;
  static constexpr bool turns = Map::template turns<Size>;
  using Memory = TileMemory<R, Size::capacity>;
  static constexpr int registers = Memory::size / N;

  // What the rounds hand on beside the weights in lanes and what Map keeps of the direction: ||xi||^2, the scale and
  // the step, and the lanes whose numbers are out of range.
  struct Block {
    T square, scale, step;
    Mask<R> out;
    bool good;
  };
  struct Kept {
    T q[is_linear ? 1 : registers], tangent[registers];
    Block block[is_fixed ? (registers + Size::capacity - 1) / Size::capacity : registers];
  };

  const Job& job;
  const Size size;
  const int width;  // components of a tile
  const Momentum<R> momentum;
  const StepSize<R> step_size;
  const bool native;         // storage is R itself
  const bool steady;         // the commonest step: buffers exist, nothing is negated, looked ahead or damped
  const T scale0, inverse0;  // of the first component: of all where they share it
  static constexpr R largest_square = Limits<R>::huge_square;

  // Of a component; a constant where the size is one.
  MK_FN int elements() const { return size.n * size.p; }

  // The tile from k on; `skip` tells components to leave out, which needs a copy.
  Tile<R> tile_at(int64_t k, int64_t end, bool second, const uint8_t* skip, Memory& memory) const {
    Tile<R> t;
    const int E = elements();
    const Run run = run_at(job, k, end);
    t.k = k;
    t.count = int(end - k < width ? end - k : width);
    const int in_place = int(run.length < t.count ? run.length : t.count) / N * N;
    const bool lanes = is_fixed && run.weight_step == 1 && run.grad_step == 1;
    const bool ordered = run.weight_step == E && run.grad_step == E && job.weight_in_order && job.grad_in_order;
    t.copied = !(native && !skip && in_place > 0 && (lanes || ordered));
    t.in_lanes = !t.copied && lanes;
    if (!t.copied) {
      t.count = in_place;
      t.w = static_cast<R*>(job.weight) + run.weight;
      t.g = static_cast<const R*>(job.grad) + run.grad;
      t.m = job.momentum ? static_cast<R*>(job.momentum) + run.weight : nullptr;
      return t;
    }
    t.w = memory.w;
    t.g = memory.g;
    t.m = memory.m;
    const int padded = (t.count + N - 1) / N * N;
    const auto take = [&](void* base, bool grad, R* into) {
      copy<R, Size, false>(job, base, grad, k, t.count, size, skip, into);
      for (int i = t.count * E; i < padded * E; i++) into[i] = R(0);
    };
    take(job.weight, false, memory.w);
    if (!second || !momentum.buffer_is_direction()) take(const_cast<void*>(job.grad), true, memory.g);
    if (momentum.buffered && (second || !momentum.first)) take(job.momentum, false, memory.m);
    return t;
  }

  // Where register i of the block at component l of the tile lies, in w and m or in g.
  template <bool InLanes>
  MK_FN int64_t weight_at(int l, int i) const {
    return InLanes ? job.weight_offset[i] + l : int64_t(l) * elements() + i * N;
  }
  template <bool InLanes>
  MK_FN int64_t grad_at(int l, int i) const {
    return InLanes ? job.grad_offset[i] + l : int64_t(l) * elements() + i * N;
  }

  // The new buffer (the stored one in the second pass), or the gradient where there is none.
  MK_FN T buffer_at(bool second, const R* g, const R* m) const {
    if (second && momentum.buffered) return T::load(m);
    const T gradient = momentum.gradient(T(R(0)), T::load(g));
    if (!momentum.buffered) return gradient;
    return as_stored(job.storage, momentum.buffer(gradient, momentum.first ? T(R(0)) : T::load(m)));
  }
  MK_FN T direction_at(bool second, const R* g, const R* m) const {
    const T buffer = buffer_at(second, g, m);
    return momentum.nesterov ? momentum.direction(momentum.gradient(T(R(0)), T::load(g)), buffer) : buffer;
  }
  // The same for the registers of the block at l, out of the way of the commonest step.
  template <bool InLanes>
  __attribute__((noinline)) void form(const Tile<R>& t, int l, bool second, T* direction, T* buffer) const {
    for (int i = 0; i < elements(); i++) {
      const R *const g = t.g + grad_at<InLanes>(l, i), *const m = t.m + weight_at<InLanes>(l, i);
      direction[i] = direction_at(second, g, m);
      buffer[i] = buffer_at(second, g, m);
    }
  }

  // f(i, offset in w and m, direction, buffer) for the registers of the block at l. Pointers are copied, for the
  // compiler has to assume that a store may change whatever is in memory.
  template <bool InLanes, class F>
  MK_FN void each(const Tile<R>& t, int l, bool second, const F& f) const {
    const int E = elements();
    const R *const g = t.g, *const m = t.m;
    if (steady && !second) {
      const T mu = T(momentum.momentum);
      for (int i = 0; i < E; i++) {
        const int64_t weight = weight_at<InLanes>(l, i);
        const T buffer = T::load(g + grad_at<InLanes>(l, i)) + T::load(m + weight) * mu;
        f(i, weight, buffer, buffer);
      }
    } else if (second && momentum.buffer_is_direction()) {
      for (int i = 0; i < E; i++) {
        const int64_t weight = weight_at<InLanes>(l, i);
        const T buffer = T::load(m + weight);
        f(i, weight, buffer, buffer);
      }
    } else {
      T direction[Size::capacity], buffer[Size::capacity];
      form<InLanes>(t, l, second, direction, buffer);
      for (int i = 0; i < E; i++) f(i, weight_at<InLanes>(l, i), direction[i], buffer[i]);
    }
  }

  // What the next tile will read at this place, while the last round leaves memory idle.
  template <bool InLanes>
  MK_FN void prefetch_next(const Tile<R>& t, int l, bool second) const {
    if (t.copied) return;
    const bool wants_gradient = !second || !momentum.buffer_is_direction();
    for (int i = 0; i < elements(); i++) {
      const int64_t weight = weight_at<InLanes>(l + t.count, i);
      __builtin_prefetch(t.w + weight, 1);
      if (momentum.buffered) __builtin_prefetch(t.m + weight, 1);
      if (wants_gradient) __builtin_prefetch(t.g + grad_at<InLanes>(l + t.count, i), 0);
    }
  }

  template <bool InLanes>
  MK_FN void bring(const T* in_memory, T* x) const {
    if constexpr (InLanes) {
      for (int e = 0; e < elements(); e++) x[e] = in_memory[e];
    } else {
      to_lanes(in_memory, x, size);
    }
  }

  LaneOrder order_of(const Tile<R>& t) const { return t.in_lanes ? LaneOrder{1} : lane_order<R>(size); }

  // 1 where there is no component, so that nothing but a component can be out of range.
  __attribute__((noinline)) T scale_of(const Tile<R>& t, int l, const uint8_t* skip) const {
    const LaneOrder order = order_of(t);
    R scale[N];
    for (int i = 0; i < N; i++) {
      const int inside = l + order.component<R>(i);
      scale[i] = inside < t.count && !(skip && skip[inside]) ? R(job.scale(t.k + inside)) : R(1);
    }
    return T::load(scale);
  }

  // The first round: what a block steps along and from, projected; the new momentum is stored.
  template <bool InLanes>
  MK_FN void project(const Tile<R>& t, int l, bool second, const uint8_t* skip, Block& b, T* q, T* tangent) const {
    const int E = elements();
    const R* const base = t.w;
    R* const m = t.m;
    T direction[Size::capacity], buffer[Size::capacity], d[Size::capacity], w[Size::capacity];
    each<InLanes>(t, l, second, [&](int i, int64_t, T along, T stored) {
      direction[i] = along;
      buffer[i] = stored;
    });
    bring<InLanes>(direction, d);
    for (int i = 0; i < E; i++) direction[i] = T::load(base + weight_at<InLanes>(l, i));
    bring<InLanes>(direction, w);
    b.scale = scale0;
    T inverse = inverse0;
    if (job.scale_stride || skip || l + N > t.count) {
      b.scale = scale_of(t, l, skip);
      inverse = T(R(1)) / b.scale;
    }
    b.step = inverse;
    // Whatever is not finite in the direction shows in its tangent part.
    const T length = square_norm(w, E);
    if constexpr (is_linear) {
      b.square = Map::observe(w, d, length, inverse, tangent, size);
    } else if constexpr (turns) {
      b.square = stiefel::turn(w, d, inverse, tangent, size);
      for (int e = 0; e < E; e++) q[e] = w[e];
    } else {
      for (int e = 0; e < E; e++) w[e] = w[e] * inverse;
      b.square = Map::project(w, d, tangent, size);
      for (int e = 0; e < E; e++) q[e] = w[e];
    }
    b.out = !((b.square <= T(largest_square)) & (length <= T(largest_square)));
    b.good = !any(b.out);
    if (b.good && momentum.buffered && !second)
      for (int i = 0; i < E; i++) buffer[i].store(m + weight_at<InLanes>(l, i));
  }

  template <bool InLanes>
  MK_FN bool project_all(const Tile<R>& t, bool second, const uint8_t* skip, Kept& kept) const {
    bool all_good = true;
    for (int l = 0, b = 0; l < t.count; l += N, b++) {
      project<InLanes>(t, l, second, skip, kept.block[b], kept.q + (is_linear ? 0 : b * elements()),
                       kept.tangent + b * elements());
      all_good &= kept.block[b].good;
    }
    return all_good;
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

  // The third round, for a Map that ends on a combination of weight and direction: both as they lie in memory, where
  // the new momentum is stored already.
  template <bool InLanes>
  MK_FN void combine(const Tile<R>& t, int l, T along_weight, T along_direction) const {
    R* const w = t.w;
    each<InLanes>(t, l, true, [=, this](int i, int64_t weight, T direction, T) {
      T a = along_weight, b = along_direction;
      if constexpr (!InLanes) {
        a = spread(a, i, size);
        b = spread(b, i, size);
      }
      fma(b, direction, a * T::load(w + weight)).store(w + weight);
    });
  }

  // The second and third round. True where some component's step leaves the range: it is marked in its block, and
  // keeps its weight.
  template <bool InLanes>
  MK_FN bool step_tile(const Pass& pass, const Tile<R>& t, Kept& kept) const {
    Mask<R> any_far = T(R(0)) < T(R(0));
    for (int l = 0, i = 0; l < t.count; l += N, i++) {
      Block& b = kept.block[i];
      if (!b.good) continue;
      if (pass.kind == Pass::whole && job.norms) write_roots(b.square, order_of(t), t.count - l, job.norms + t.k + l);
      b.step = -(pass.kind == Pass::second ? T(R(pass.step)) : step_size(b.square)) * b.step;
      b.out = !(b.step * b.step * b.square <= T(largest_square));
      if constexpr (is_linear) {
        const T* sums = kept.tangent + i * elements();
        b.out = b.out | !Map::is_stable(sums, b.step, b.square);
        const auto arc = Map::arc(sums, b.step, b.square);
        b.square = select(b.out, T(R(1)), arc.a);
        b.step = select(b.out, T(R(0)), arc.b * b.scale);
      }
      any_far = any_far | b.out;
    }
    for (int l = 0, i = 0; l < t.count; l += N, i++) {
      const Block& b = kept.block[i];
      prefetch_next<InLanes>(t, l, pass.kind == Pass::second);
      if (!b.good) continue;
      if constexpr (is_linear) {
        combine<InLanes>(t, l, b.square, b.step);
      } else {
        retract<InLanes>(t, l, b, kept.q + i * elements(), kept.tangent + i * elements());
      }
    }
    return any(any_far);
  }

  template <bool InLanes>
  MK_FN void retract(const Tile<R>& t, int l, const Block& b, const T* kept_q, const T* tangent) const {
    const int E = elements();
    R* const w = t.w;
    T q[Size::capacity], x[Size::capacity];
    for (int e = 0; e < E; e++) q[e] = kept_q[e];
    if constexpr (turns) {
      stiefel::retract_turn(q, tangent, b.step, b.square, b.scale, size);
    } else {
      Map::retract(q, tangent, b.step, b.square, size);
      for (int e = 0; e < E; e++) q[e] = q[e] * b.scale;
    }
    if (any(b.out)) {
      T old[Size::capacity];
      for (int i = 0; i < E; i++) x[i] = T::load(w + weight_at<InLanes>(l, i));
      bring<InLanes>(x, old);
      for (int e = 0; e < E; e++) q[e] = select(b.out, old[e], q[e]);
    }
    if constexpr (InLanes) {
      for (int e = 0; e < E; e++) q[e].store(w + weight_at<true>(l, e));
    } else {
      from_lanes(q, x, size);
      for (int i = 0; i < E; i++) x[i].store(w + weight_at<false>(l, i));
    }
  }

  // Sets a flag for every component whose lane its block has out.
  __attribute__((noinline)) void mark(const Tile<R>& t, const Kept& kept, uint8_t* flag) const {
    const LaneOrder order = order_of(t);
    for (int l = 0, b = 0; l < t.count; l += N, b++)
      for (int i = 0; i < N; i++)
        if (l + order.component<R>(i) < t.count) flag[l + order.component<R>(i)] |= kept.block[b].out.v[i] != 0;
  }

  template <class F>
  MK_FN bool with_layout(const Tile<R>& t, const F& f) const {
    if constexpr (is_fixed) {
      if (t.in_lanes) return f(std::true_type{});
    }
    return f(std::false_type{});
  }

 public:
  Lanes(const Job& job, Size size)
      : job(job),
        size(size),
        width(Tile<R>::elements / (elements() * N) > 0 ? Tile<R>::elements / (elements() * N) * N : N),
        momentum(momentum_of<R>(job)),
        step_size(step_size_of<R>(job)),
        native(job.storage == (sizeof(R) == 4 ? Storage::float32 : Storage::float64)),
        steady(momentum.buffer_is_direction() && !momentum.first && momentum.plain && native &&
               momentum.one_minus_dampening == R(1)),
        scale0(R(job.scales[0])),
        inverse0(T(R(1)) / scale0) {}

  void run(const Pass& pass) const {
    Memory memory;
    Kept kept;
    Sums sums;
    double alone_squares = 0;
    for (int64_t k = pass.begin; k < pass.end;)
      k += step_from(pass, k, pass.end, pass.skipped ? pass.skipped + k : nullptr, false, memory, kept, sums,
                     alone_squares);
    if (pass.kind == Pass::first) pass.out->square += total(sums.sum) + alone_squares;
  }

 private:
  // A tile from k on, without the components in `skip`; returns how many components it had. `again`: the second try,
  // where nothing but the hyper-parameters can be out of range.
  int step_from(const Pass& pass, int64_t k, int64_t end, const uint8_t* skip, bool again, Memory& memory, Kept& kept,
                Sums& sums, double& alone_squares) const {
    const bool first = pass.kind == Pass::first, second = pass.kind == Pass::second;
    const Tile<R> t = tile_at(k, end, second, skip, memory);
    const bool all_good =
        with_layout(t, [&](auto lanes) { return project_all<decltype(lanes)::value>(t, second, skip, kept); });
    bool far = false;
    if (first) {
      for (int l = 0, b = 0; l < t.count; l += N, b++)
        if (kept.block[b].good) sums.add(kept.block[b].square);
    } else {
      far = with_layout(t, [&](auto lanes) { return step_tile<decltype(lanes)::value>(pass, t, kept); });
    }
    if (all_good && !far) {
      put_back(t, first, second, skip, memory);
    } else {
      step_rest(pass, t, skip, again, memory, kept, sums, alone_squares);
    }
    return t.count;
  }

  void put_back(const Tile<R>& t, bool first, bool second, const uint8_t* skip, Memory& memory) const {
    if (!t.copied) return;
    if (!first) copy<R, Size, true>(job, job.weight, false, t.k, t.count, size, skip, memory.w);
    if (!second && momentum.buffered) copy<R, Size, true>(job, job.momentum, false, t.k, t.count, size, skip, memory.m);
  }

  // What is left of a tile: blocks with components out of range, and components that go far.
  __attribute__((noinline)) void step_rest(const Pass& pass, const Tile<R>& t, const uint8_t* skip, bool again,
                                           Memory& memory, Kept& kept, Sums& sums, double& alone_squares) const {
    const bool first = pass.kind == Pass::first, second = pass.kind == Pass::second;
    uint8_t out[TileMemory<R, 1>::size + N] = {}, bad[TileMemory<R, 1>::size + N] = {}, left[N];
    mark(t, kept, out);
    for (int l = 0, b = 0; l < t.count; l += N, b++)
      for (int i = 0; i < N; i++) bad[l + i] = !kept.block[b].good;
    uint8_t keep[TileMemory<R, 1>::size + N];
    for (int i = 0; i < t.count; i++) keep[i] = bad[i] || (skip && skip[i]);
    put_back(t, first, second, keep, memory);
    for (int l = 0; l < t.count; l += N) {
      if (!bad[l]) continue;
      if (again) {
        for (int i = 0; i < N; i++) out[l + i] = 1;
        continue;
      }
      for (int i = 0; i < N; i++) left[i] = l + i < t.count && (out[l + i] || (skip && skip[l + i]));
      step_from(pass, t.k + l, t.k + (l + N < t.count ? l + N : t.count), left, true, memory, kept, sums,
                alone_squares);
    }
    for (int i = 0; i < t.count; i++) {
      if (!out[i] || (skip && skip[i])) continue;
      // A far component has its momentum already.
      const bool has_momentum = second || !bad[i];
      const double stop = __builtin_nan("");
      const double square = run_alone(job, t.k + i, has_momentum, first ? &stop : second ? &pass.step : nullptr);
      if (pass.kind == Pass::whole && job.norms)
        job.norms[t.k + i] = square >= 0 ? __builtin_sqrt(square) : __builtin_nan("");
      if (square >= 0) {
        alone_squares += square;
      } else if (!second) {
        pass.out->nonfinite++;
        if (first) pass.newly_skipped[t.k + i] = 1;
      }
    }
  }
};

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
