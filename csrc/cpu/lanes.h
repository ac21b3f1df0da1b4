// Steps of small matrices, one matrix a lane.
//
// Components are taken a block at a time, a block being a register full of matrices, in three stages: momentum and
// projection; step size; retraction. Each is a long chain of dependent operations, so that while a block is projected,
// the one before it gets its step and the one before that is retracted: they keep each other's waiting times busy, and
// memory is read at an even pace.
//
// Before the first block with a number that is not finite a tile of blocks ends, and nothing of that block is written;
// it is done by itself, without the components concerned. Components whose squares leave the range keep their weight
// in the stages, and are stepped by the same mathematics in the next wider type.
#pragma once

#include "cpu/blocks.h"
#include "cpu/maps.h"
#include "cpu/pass.h"

namespace mk {
namespace MK_ISA {
namespace {

// The roots of the squares of a block's components.
template <class R>
__attribute__((noinline)) void write_roots(const Pack<R>& square, LaneOrder order, int count, double* roots) {
  for (int i = 0; i < Pack<R>::lanes; i++)
    if (order.component<R>(i) < count) roots[order.component<R>(i)] = __builtin_sqrt(double(square.v[i]));
}

template <class L>
class Pairs;
template <class L, class S>
class Streams;

// R is the arithmetic type and S the storage that is stepped in place.
template <class R, class Map, class Size, class S = R>
class Lanes : Blocks<R, Size, S> {
  friend class Pairs<Lanes>;
  template <class, class>
  friend class Streams;
  using Base = Blocks<R, Size, S>;
  using Base::elements;
  using Base::is_fixed;
  using Base::job;
  using Base::longest;
  using Base::momentum;
  using Base::N;
  using Base::native;
  using Base::order_of;
  using Base::put_back;
  using Base::size;
  using Base::steady;
  using Base::tile_at;
  using Base::width;
  using typename Base::Memory;
  using typename Base::T;
  template <class P>
  static constexpr bool large = Base::template large<P>;
  using Arithmetic = T;
  static constexpr int capacity = Size::capacity;
  static constexpr bool is_linear = Map::template is_linear<Size>;
  static constexpr bool turns = Map::template turns<Size>;
  // How many blocks a stage is behind the one before it. Large ones hide their waiting times by themselves, and three
  // of them would not fit into the first-level cache.
  static constexpr int lag = is_fixed && Size::capacity <= 32 ? 1 : 0;
  static constexpr int kept_blocks = lag ? 4 : 1;  // enough from the first stage to the last, and a power of two
  // Whether the passes of groups have bodies of their own, as whole steps have: what nobody waits for is not compiled.
  static constexpr bool has_passes = lag && Size::capacity == 9;
  static constexpr int fitting = Memory::size / (Size::capacity * N);
  static constexpr int group_blocks = !is_fixed ? 0 : fitting < longest ? fitting : longest;  // of a group in one tile

  // What the stages hand on.
  struct Kept {
    T q[is_linear ? 1 : Size::capacity], tangent[Size::capacity];  // weights in lanes; what Map keeps of the direction
    T square, step;
    T scale, inverse;  // where components have scales of their own
  };
  // Sums that the first pass keeps over the tiles; Kahan's, so that the length of a chunk costs no accuracy.
  struct Sums {
    T sum = T(R(0)), lost = T(R(0));
    double alone = 0;
    MK_FN void add(T x) {
      const T term = x - lost, next = sum + term;
      lost = (next - sum) - term;
      sum = next;
    }
  };
  struct Work {
    Memory memory;
    Kept kept[kept_blocks];
    Mask<R> out[longest];  // the components out of range, block by block
    Sums sums;
  };

  const StepSize<R> step_size;
  const bool uniform;
  const T scale0, inverse0;
  static constexpr R largest_square = Limits<R>::huge_square;

  // All components share the first one's scale.
  template <class P>
  MK_FN bool is_uniform() const {
    return P::ordinary || uniform;
  }
  Body body_of(const Pass& pass) const {
    if (!lag || !steady || !uniform) return Body::general;
    if (pass.kind == Pass::whole) return !job.norms && step_size.is_flat() ? Body::whole : Body::general;
    if (!has_passes) return Body::general;
    return pass.kind == Pass::first ? Body::first : Body::second;
  }

  __attribute__((noinline)) void bring_scales(const Tile& t, int l, Kept& kept) const {
    const LaneOrder order = order_of(t);
    R scales[N];
    for (int i = 0; i < N; i++) {
      const int inside = l + order.component<R>(i);
      scales[i] = R(job.scale(t.k + (inside < t.count ? inside : t.count - 1)));
    }
    kept.scale = T::load(scales);
    kept.inverse = T(R(1)) / kept.scale;
  }

  // A weight and what it steps along, in lanes, projected. Where Map wants the weight at unit scale, q becomes that.
  MK_FN void observe(T* q, const T* d, T inverse, Kept& kept) const {
    const int E = elements();
    if constexpr (turns) {
      kept.square = Map::turn(q, d, inverse, kept.tangent, size);
    } else if constexpr (is_linear) {
      kept.square = Map::observe(q, d, inverse, kept.tangent, size);
    } else {
      const T length = square_norm(q, E);
      for (int e = 0; e < E; e++) q[e] = q[e] * inverse;
      kept.square = Map::project(q, d, kept.tangent, size);
      kept.square = select(length <= T(largest_square), kept.square, T(Limits<R>::largest));
    }
  }
  // The first stage: what a block steps along and from, projected, and the new momentum, which is stored. False, with
  // nothing done, where something is not finite and nobody has seen to it yet.
  template <class P>
  MK_FN bool project(const Tile& t, int l, bool second, bool seen, Kept& kept) const {
    if (!is_uniform<P>()) bring_scales(t, l, kept);
    const T inverse = is_uniform<P>() ? inverse0 : kept.inverse;
    using Number = typename P::Number;
    const int E = elements();
    const Number* const base = this->template block_of<P>(static_cast<const Number*>(t.w), l);
    T direction[Size::capacity], weight[Size::capacity], d[Size::capacity], own[Size::capacity];
    T* const q = large<P> && !is_linear ? kept.q : own;
    this->template directions_at<P>(t, l, second, direction);
    // Not finite if any factor is not (or the sum overflows, which costs time only).
    T sum;
    if constexpr (large<P>) {
      sum = this->template product_with_weight<P>(direction, base);
    } else {
      for (int i = 0; i < E; i++) weight[i] = load(base + this->template weight_at<P>(i));
      sum = inner(direction, weight, E, 1);
    }
    if (!seen && any(!(abs(sum) <= T(Limits<R>::largest)))) return false;
    if ((P::ordinary || momentum.buffered) && !second) {
      if (this->template is_steady<P>()) {
        Number* const m = this->template block_of<P>(static_cast<Number*>(t.m), l);
        for (int i = 0; i < E; i++) store_exact(m + this->template weight_at<P>(i), direction[i]);
      } else {
        this->template form_buffers<P>(t, l);
      }
    }
    if constexpr (large<P>) {
      this->template bring_large<P>(t, l, direction, d, q);
    } else {
      this->template bring<P>(direction, d);
      this->template bring<P>(weight, q);
    }
    observe(q, d, inverse, kept);
    if constexpr (!is_linear && !large<P>)
      for (int e = 0; e < E; e++) kept.q[e] = q[e];
    return true;
  }

  // The second stage; returns the components out of range.
  template <class P>
  MK_FN Mask<R> find_step(const Pass& pass, const Tile& t, int l, Kept& kept) const {
    const T square = kept.square;
    T length;
    if constexpr (P::second) {
      length = T(R(pass.step));
    } else if constexpr (P::ordinary) {
      length = step_size.flat(square);
    } else {
      if (pass.kind == Pass::whole && job.norms)
        write_roots(kept.square, order_of(t), t.count - l, job.norms + t.k + l);
      length = pass.kind == Pass::second ? T(R(pass.step)) : step_size(square);
    }
    const T step = -length * (is_uniform<P>() ? inverse0 : kept.inverse);
    if constexpr (is_linear) {
      sphere::Arc<T> arc;
      const Mask<R> good = Map::arc(kept.tangent, step, square, &arc);
      kept.square = select(good, arc.a, T(R(1)));
      kept.step = select(good, arc.b * (is_uniform<P>() ? scale0 : kept.scale), T(R(0)));
      return !good;
    } else {
      kept.step = step;
      return !((square <= T(largest_square)) & (step * step * square <= T(largest_square)));
    }
  }

  // The third stage, for a Map that ends on a combination of weight and direction: both as they lie in memory.
  template <class P>
  MK_FN void combine(const Tile& t, int l, const Kept& kept) const {
    using Number = typename P::Number;
    Number* const w = this->template block_of<P>(static_cast<Number*>(t.w), l);
    T direction[Size::capacity];
    this->template directions_at<P>(t, l, true, direction);
    for (int i = 0; i < elements(); i++) {
      T a = kept.square, b = kept.step;
      if constexpr (!P::in_lanes) {
        a = spread(a, i, size);
        b = spread(b, i, size);
      }
      // Looking ahead, a finite momentum may give an infinite direction, for a component that is out of range.
      if (!this->template is_steady<P>())
        direction[i] = select(abs(direction[i]) <= T(Limits<R>::largest), direction[i], T(R(0)));
      const int64_t at = this->template weight_at<P>(i);
      put(w + at, fma(b, direction[i], a * T(load(w + at))));
    }
  }

  // The new weight y of an old one as observe() left it; the mask of the matrices for which that is good.
  MK_FN Mask<R> retracted(const T* old, const Kept& kept, T scale, T* y) const {
    if constexpr (turns) return Map::retract_near(old, kept.tangent, kept.step, kept.square, scale, y, size);
    T q[Size::capacity];
    for (int e = 0; e < elements(); e++) q[e] = old[e];
    Map::retract(q, kept.tangent, kept.step, kept.square, size);
    for (int e = 0; e < elements(); e++) y[e] = q[e] * scale;
    return T(R(0)) <= T(R(0));
  }

  // The third stage. False, with nothing done, where a block needs more than a sane step's: to call it from here would
  // have all registers in memory for its sake.
  template <class P>
  MK_FN bool retract(const Tile& t, int l, Mask<R> out, const Kept& kept) const {
    T y[Size::capacity];
    if (any(out | !retracted(kept.q, kept, is_uniform<P>() ? scale0 : kept.scale, y))) return false;
    this->template store_lanes<P>(t.w, l, y);
    return true;
  }
  // The same for a block with long turns and components out of range, which keep their weight.
  template <class P>
  __attribute__((noinline)) Mask<R> retract_rest(const Tile& t, int l, Mask<R> out, const Kept& kept) const {
    const int E = elements();
    const T scale = is_uniform<P>() ? scale0 : kept.scale;
    T x[Size::capacity], old[Size::capacity], q[Size::capacity];
    const typename P::Number* const w = this->template block_of<P>(static_cast<const typename P::Number*>(t.w), l);
    for (int i = 0; i < E; i++) x[i] = load(w + this->template weight_at<P>(i));
    this->template bring<P>(x, old);
    for (int e = 0; e < E; e++) q[e] = kept.q[e];
    if constexpr (turns) {
      Map::retract_turn(q, kept.tangent, kept.step, kept.square, scale, size);
      out = out | !(square_norm(old, E) <= T(largest_square));
    } else {
      Map::retract(q, kept.tangent, kept.step, kept.square, size);
      for (int e = 0; e < E; e++) q[e] = q[e] * scale;
    }
    for (int e = 0; e < E; e++) q[e] = select(out, old[e], q[e]);
    this->template store_lanes<P>(t.w, l, q);
    return out;
  }

  // The third stage by whatever way; whether some component is out of range.
  template <class P>
  MK_FN bool finish(const Tile& t, int l, Mask<R>& out, const Kept& kept) const {
    if constexpr (is_linear) {
      combine<P>(t, l, kept);
    } else if (!retract<P>(t, l, out, kept)) {
      out = retract_rest<P>(t, l, out, kept);
    }
    return any(out);
  }

  // A block that has taken the first stage, done over from the stored momentum; whether some component is out of range.
  template <class P>
  __attribute__((noinline)) bool step_over(const Pass& pass, const Tile& t, int block, Work& work) const {
    Kept kept;
    project<P>(t, block * N, true, true, kept);
    work.out[block] = find_step<P>(pass, t, block * N, kept);
    return finish<P>(t, block * N, work.out[block], kept);
  }

  // The stages over a tile; returns how many of its components come before the first block with something that is not
  // finite.
  template <class P>
  MK_FN int step_blocks(const Pass& pass, const Tile& t, bool seen, Work& work, bool& any_out) const {
    const bool second = P::ordinary ? P::second : pass.kind == Pass::second;
    const auto kept = [&](int block) -> Kept& { return work.kept[block % kept_blocks]; };
    if constexpr (P::streams && Size::capacity <= 16) return Streams<Lanes, S>(*this, pass, t).run(work, any_out);
    int end = t.count, begin = 0;
    if constexpr (P::pairs && is_fixed) begin = Pairs<Lanes>(*this, pass, t).run(work, any_out);
    for (int b = begin; b * N < end + 2 * lag * N; b++) {
      if (b * N < end && !project<P>(t, b * N, second, seen, kept(b))) end = b * N;
      if (const int s = b - lag; s >= begin && s * N < end) work.out[s] = find_step<P>(pass, t, s * N, kept(s));
      if (const int r = b - 2 * lag; r >= begin && r * N < end) {
        any_out |= finish<P>(t, r * N, work.out[r], kept(r));
      }
    }
    return end;
  }
  // The same for the first pass, which ends with the norms.
  template <class P>
  MK_FN int add_squares(const Tile& t, bool seen, Work& work, bool& any_out) const {
    for (int l = 0, b = 0; l < t.count; l += N, b++) {
      if (!project<P>(t, l, false, seen, work.kept[0])) return l;
      const T square = work.kept[0].square;
      const Mask<R> out = !(square <= T(largest_square));
      work.sums.add(select(out, T(R(0)), square));
      work.out[b] = out;
      any_out |= any(out);
    }
    return t.count;
  }

  // The components of a tile that are out of range.
  __attribute__((noinline)) void step_out(const Pass& pass, const Tile& t, const uint8_t* skip, Work& work) const {
    const LaneOrder order = order_of(t);
    const double stop = __builtin_nan("");
    const double* const step = pass.kind == Pass::first ? &stop : pass.kind == Pass::second ? &pass.step : nullptr;
    for (int l = 0, b = 0; l < t.count; l += N, b++) {
      for (int i = 0; i < N; i++) {
        const int inside = l + order.component<R>(i);
        if (!work.out[b].at(i) || inside >= t.count || (skip && skip[inside])) continue;
        const double square = run_alone(job, t.k + inside, step);
        if (pass.kind == Pass::whole && job.norms) job.norms[t.k + inside] = __builtin_sqrt(square);
        work.sums.alone += square;
      }
    }
  }

  // A block with something that is not finite: its other components. Returns how many it has.
  __attribute__((noinline)) int step_around(const Pass& pass, int64_t k, int64_t end, Work& work) const {
    const int count = int(end - k < N ? end - k : N);
    uint8_t skip[N];
    for (int i = 0; i < count; i++) skip[i] = !is_finite(job, k + i);
    step_from(pass, k, k + count, skip, work);
    for (int i = 0; i < count; i++) {
      if (!skip[i]) continue;
      pass.out->nonfinite++;
      if (pass.kind == Pass::first) pass.newly_skipped[k + i] = 1;
      if (pass.kind == Pass::whole && job.norms) job.norms[k + i] = __builtin_nan("");
    }
    return count;
  }

  // A tile from k on, without the components in `skip`; returns how many components it had.
  int step_from(const Pass& pass, int64_t k, int64_t end, const uint8_t* skip, Work& work) const {
    const bool first = pass.kind == Pass::first, second = pass.kind == Pass::second;
    Tile t = tile_at(k, end, width, second, skip, work.memory);
    const int whole = t.count;
    const bool seen = second || skip;
    bool any_out = false;
    const auto step = [&](auto place) { return step_blocks<decltype(place)>(pass, t, seen, work, any_out); };
    const auto add = [&](auto place) { return add_squares<decltype(place)>(t, seen, work, any_out); };
    switch (body_of(pass)) {
      case Body::whole:
        t.count = this->template with_place<lag ? Body::whole : Body::general>(t, step);
        break;
      case Body::first:
        t.count = this->template with_place<has_passes ? Body::first : Body::general>(t, add);
        break;
      case Body::second:
        t.count = this->template with_place<has_passes ? Body::second : Body::general>(t, step);
        break;
      default:
        t.count = first ? this->template with_place<Body::general>(t, add)
                        : this->template with_place<Body::general>(t, step);
    }
    put_back(t, first, second, skip, work.memory);
    if (any_out) step_out(pass, t, skip, work);
    return t.count == whole ? whole : t.count + step_around(pass, k + t.count, end, work);
  }

  // Both passes over a shared group on one copy of its components. False, with nothing done, where they fill more than
  // a tile or something is not finite or out of range.
  bool step_group(const Pass& pass) const {
    if (!job.listed || pass.end - pass.begin > group_blocks * N) return false;
    if constexpr (is_fixed) {
      using P = Place<false, R, Body::general>;
      Work work;
      Kept kept[group_blocks];
      const Tile t = tile_at(pass.begin, pass.end, group_blocks * N, false, nullptr, work.memory);
      for (int l = 0, b = 0; l < t.count; l += N, b++) {
        if (!project<P>(t, l, false, false, kept[b]) || any(!(kept[b].square <= T(largest_square)))) return false;
        work.sums.add(kept[b].square);
      }
      pass.out->square = total(work.sums.sum);
      const Pass second{Pass::second, pass.begin, pass.end,
                        nullptr,      nullptr,    step_size_of<double>(job)(pass.out->square),
                        nullptr,      nullptr};
      bool any_out = false;
      for (int l = 0, b = 0; l < t.count; l += N, b++) work.out[b] = find_step<P>(second, t, l, kept[b]);
      for (int l = 0, b = 0; l < t.count; l += N, b++) any_out |= finish<P>(t, l, work.out[b], kept[b]);
      put_back(t, false, false, nullptr, work.memory);
      if (any_out) step_out(second, t, nullptr, work);
      return true;
    }
    return false;
  }

 public:
  Lanes(const Job& job, Size size)
      : Base(job, size),
        step_size(step_size_of<R>(job)),
        uniform(job.scale_stride == 0),
        scale0(R(job.scales[0])),
        inverse0(T(R(1)) / scale0) {}

  void run(const Pass& pass) const {
    if (pass.kind == Pass::group) return void(*pass.stepped = step_group(pass));
    Work work;
    for (int64_t k = pass.begin; k < pass.end;)
      k += step_from(pass, k, pass.end, pass.skipped ? pass.skipped + k : nullptr, work);
    if (pass.kind == Pass::first) pass.out->square += total(work.sums.sum) + work.sums.alone;
  }
};

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
