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

#include "cpu/maps.h"
#include "cpu/packed.h"
#include "cpu/pass.h"
#include "cpu/tile.h"
#include "cpu/transpose.h"

namespace mk {
namespace MK_ISA {
namespace {

// The roots of the squares of a block's components.
template <class R>
__attribute__((noinline)) void write_roots(const Pack<R>& square, LaneOrder order, int count, double* roots) {
  for (int i = 0; i < Pack<R>::lanes; i++)
    if (order.component<R>(i) < count) roots[order.component<R>(i)] = __builtin_sqrt(double(square.v[i]));
}

// The ordinary step is the commonest, and has bodies of its own, for each pass, in which no block asks what kind of
// step this is.
enum class Body { general, whole, first, second };

// How a tile lies, as numbers of type S, in lanes already or one matrix after the other, and by which body it is
// stepped.
template <bool InLanes, class S, Body Of>
struct Place {
  static constexpr bool in_lanes = InLanes, ordinary = Of != Body::general, second = Of == Body::second;
  static constexpr bool whole = Of == Body::whole;
  static constexpr bool pairs = has_packed && whole && !in_lanes && std::is_same<S, BFloat16>::value;  // see pairs.h
  static constexpr bool streams = whole && in_lanes;                                                   // see streams.h
  using Number = S;
};

template <class L>
class Pairs;
template <class L, class S>
class Streams;

// R is the arithmetic type and S the storage that is stepped in place; all else is converted where a tile is copied.
template <class R, class Map, class Size, class S = R>
class Lanes {
  friend class Pairs<Lanes>;
  template <class, class>
  friend class Streams;
  using T = Pack<R>;
  using Arithmetic = T;
  static constexpr int capacity = Size::capacity;
  static constexpr int N = T::lanes;
  // channels_last tiles are stepped in place at the sizes of size.h; a second body for all others would not pay.
  static constexpr bool is_fixed = !std::is_same<Size, Dynamic>::value;
  static constexpr bool is_linear = Map::template is_linear<Size>;
  static constexpr bool turns = Map::template turns<Size>;
  using Memory = TileMemory<R, Size::capacity>;
  // How many blocks a stage is behind the one before it. Large ones hide their waiting times by themselves, and three
  // of them would not fit into the first-level cache.
  static constexpr int lag = is_fixed && Size::capacity <= 32 ? 1 : 0;
  static constexpr int kept_blocks = lag ? 4 : 1;  // enough from the first stage to the last, and a power of two
  // Whether the passes of groups have bodies of their own, as whole steps have: what nobody waits for is not compiled.
  static constexpr bool has_passes = lag && Size::capacity == 9;
  static constexpr int longest = 64;  // blocks of a tile
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

  const Job& job;
  const Size size;
  const int width;  // components of a copied tile
  const Momentum<R> momentum;
  const StepSize<R> step_size;
  const bool native;  // storage is S
  const bool steady, uniform;
  const T scale0, inverse0;
  static constexpr R largest_square = Limits<R>::huge_square;

  // Of a component, and of what Map keeps; constants where the size is one.
  MK_FN int elements() const { return size.n * size.p; }
  MK_FN int tangents() const {
    if constexpr (is_linear) return Map::sums;
    if constexpr (turns) return Map::tangents(size);
    return elements();
  }

  // The tile from k on, with at most `longest_copy` components where it has to be copied; `skip` tells components to
  // leave out, which needs a copy.
  Tile tile_at(int64_t k, int64_t end, int longest_copy, bool second, const uint8_t* skip, Memory& memory) const {
    Tile t;
    const int E = elements();
    const Run run = run_at(job, k, end);
    t.k = k;
    t.count = int(end - k < longest_copy ? end - k : longest_copy);
    const int in_place = int(run.length < longest * N ? run.length : longest * N) / N * N;
    const bool lanes = is_fixed && run.weight_step == 1 && run.grad_step == 1;
    const bool ordered = run.weight_step == E && run.grad_step == E && job.weight_in_order && job.grad_in_order;
    t.copied = !(native && !skip && in_place > 0 && (lanes || ordered));
    t.in_lanes = !t.copied && lanes;
    if (!t.copied) {
      t.count = in_place;
      t.w = static_cast<S*>(job.weight) + run.weight;
      t.g = static_cast<const S*>(job.grad) + run.grad;
      t.m = job.momentum ? static_cast<S*>(job.momentum) + run.weight : nullptr;
      return t;
    }
    t.w = memory.w;
    t.g = memory.g;
    t.m = memory.m;
    const int padded = (t.count + N - 1) / N * N;
    copy<R, Size, false>(job, job.weight, false, k, t.count, size, skip, memory.w);
    // The lanes that are left over rest on the last component.
    for (int i = t.count * E; i < padded * E; i++) memory.w[i] = memory.w[i - E];
    const auto take = [&](void* base, bool grad, R* into) {
      copy<R, Size, false>(job, base, grad, k, t.count, size, skip, into);
      for (int i = t.count * E; i < padded * E; i++) into[i] = R(0);
    };
    if (!second || !momentum.buffer_is_direction()) take(const_cast<void*>(job.grad), true, memory.g);
    if (momentum.buffered && (second || !momentum.first)) take(job.momentum, false, memory.m);
    return t;
  }

  // Buffers exist and nothing is negated, looked ahead or damped; all components share the first one's scale.
  template <class P>
  MK_FN bool is_steady() const {
    return P::ordinary || steady;
  }
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

  static int width_of(int elements) {
    const int fit = tile_elements / (elements * N), blocks = fit < longest ? fit : longest;
    return (blocks > 1 ? blocks : 1) * N;
  }

  // Calls f with the Place of a tile.
  template <Body Of, class F>
  MK_FN auto with_place(const Tile& t, const F& f) const {
    if constexpr (is_fixed) {
      if (t.in_lanes) return f(Place<true, S, Of>{});
    }
    if constexpr (!std::is_same<R, S>::value) {
      if (!t.copied) return f(Place<false, S, Of>{});
    }
    return f(Place<false, R, Of>{});
  }

  // Where the block at component l of a tile begins, and where its register i lies from there, in w and m or in g. The
  // compiler is not to see where the pointer comes from: it would keep one for every register, on the stack.
  template <class P, class X>
  MK_FN X* block_of(X* tile, int l) const {
    X* begin = tile + (P::in_lanes ? l : int64_t(l) * elements());
    asm("" : "+r"(begin));
    return begin;
  }
  template <class P>
  MK_FN int64_t weight_at(int i) const {
    return P::in_lanes ? job.weight_offset[i] : i * N;
  }
  template <class P>
  MK_FN int64_t grad_at(int i) const {
    return P::in_lanes ? job.grad_offset[i] : i * N;
  }

  // Any rule's buffers and directions for the registers of the block at l, out of the way of the commonest step. The
  // new buffer is the stored one in the second pass, and the gradient where there is none.
  template <class P, class F>
  MK_FN void form(const Tile& t, int l, bool second, const F& f) const {
    using Number = typename P::Number;
    const Number *const g = block_of<P>(static_cast<const Number*>(t.g), l), *const buffers = block_of<P>(
                                                                                 static_cast<const Number*>(t.m), l);
    for (int i = 0; i < elements(); i++) {
      const T gradient = momentum.gradient(T(R(0)), T(load(g + grad_at<P>(i))));
      const Number* const m = buffers + weight_at<P>(i);
      T buffer = gradient;
      if (momentum.buffered)
        buffer = second ? T(load(m))
                        : as_stored(job.storage, momentum.buffer(gradient, momentum.first ? T(R(0)) : T(load(m))));
      f(i, momentum.nesterov ? momentum.direction(gradient, buffer) : buffer, buffer);
    }
  }
  template <class P>
  __attribute__((noinline)) void form_directions(const Tile& t, int l, bool second, T* directions) const {
    form<P>(t, l, second, [&](int i, T direction, T) { directions[i] = direction; });
  }
  template <class P>
  __attribute__((noinline)) void form_buffers(const Tile& t, int l) const {
    typename P::Number* const m = block_of<P>(static_cast<typename P::Number*>(t.m), l);
    form<P>(t, l, false, [&](int i, T, T buffer) { put(m + weight_at<P>(i), buffer); });
  }

  // Pointers are copied here and below, for the compiler has to assume that a store may change whatever is in memory.
  template <class P>
  MK_FN void directions_at(const Tile& t, int l, bool second, T* directions) const {
    using Number = typename P::Number;
    const Number *const g = block_of<P>(static_cast<const Number*>(t.g), l), *const m = block_of<P>(
                                                                                 static_cast<const Number*>(t.m), l);
    if (second && (P::ordinary || momentum.buffer_is_direction())) {
      for (int i = 0; i < elements(); i++) directions[i] = load(m + weight_at<P>(i));
    } else if (is_steady<P>() && !second) {
      const T mu = T(momentum.momentum);
      for (int i = 0; i < elements(); i++)
        directions[i] = as_stored<S>(T(load(g + grad_at<P>(i))) + T(load(m + weight_at<P>(i))) * mu);
    } else {
      T formed[Size::capacity];
      form_directions<P>(t, l, second, formed);
      for (int i = 0; i < elements(); i++) directions[i] = formed[i];
    }
  }

  template <class P>
  MK_FN void bring(const T* in_memory, T* x) const {
    if constexpr (P::in_lanes) {
      for (int e = 0; e < elements(); e++) x[e] = in_memory[e];
    } else {
      to_lanes(in_memory, x, size);
    }
  }

  // Blocks of more registers than there are: nothing is kept of them that can be read again, and since their arithmetic
  // takes longer than memory, they ask for the next block while they go into lanes.
  template <class P>
  static constexpr bool large = slides<R, Size> && !P::in_lanes && std::is_same<typename P::Number, R>::value;

  template <class P>
  MK_FN T product_with_weight(const T* direction, const R* w) const {
    T sums[4] = {T(R(0)), T(R(0)), T(R(0)), T(R(0))};
    for (int i = 0; i < elements(); i++) sums[i % 4] = fma(direction[i], T::load(w + i * N), sums[i % 4]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  template <class P>
  MK_FN void bring_large(const Tile& t, int l, const T* direction, T* d, T* q) const {
    const R *const w = block_of<P>(static_cast<const R*>(t.w), l),
                   *const next_w = block_of<P>(static_cast<const R*>(t.w), l + N),
                   *const next_g = block_of<P>(static_cast<const R*>(t.g), l + N),
                   *const next_m = block_of<P>(static_cast<const R*>(t.m), l + N);
    const auto ask = [](const R* at) { __builtin_prefetch(at, 0, 2); };  // into the second level
    const auto ask_for_direction = [&](int i) {
      ask(next_g + i * N);
      ask(next_m + i * N);
    };
    slide_to_lanes([&](int i) { return direction[i]; }, d, ask_for_direction, size);
    slide_to_lanes([&](int i) { return T::load(w + i * N); }, q, [&](int i) { ask(next_w + i * N); }, size);
  }

  LaneOrder order_of(const Tile& t) const { return t.in_lanes ? LaneOrder{1} : lane_order<R>(size); }

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
    const Number* const base = block_of<P>(static_cast<const Number*>(t.w), l);
    T direction[Size::capacity], weight[Size::capacity], d[Size::capacity], own[Size::capacity];
    T* const q = large<P> && !is_linear ? kept.q : own;
    directions_at<P>(t, l, second, direction);
    // Not finite if any factor is not (or the sum overflows, which costs time only).
    T sum;
    if constexpr (large<P>) {
      sum = product_with_weight<P>(direction, base);
    } else {
      for (int i = 0; i < E; i++) weight[i] = load(base + weight_at<P>(i));
      sum = inner(direction, weight, E, 1);
    }
    if (!seen && any(!(abs(sum) <= T(Limits<R>::largest)))) return false;
    if ((P::ordinary || momentum.buffered) && !second) {
      if (is_steady<P>()) {
        Number* const m = block_of<P>(static_cast<Number*>(t.m), l);
        for (int i = 0; i < E; i++) store_exact(m + weight_at<P>(i), direction[i]);
      } else {
        form_buffers<P>(t, l);
      }
    }
    if constexpr (large<P>) {
      bring_large<P>(t, l, direction, d, q);
    } else {
      bring<P>(direction, d);
      bring<P>(weight, q);
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
    Number* const w = block_of<P>(static_cast<Number*>(t.w), l);
    T direction[Size::capacity];
    directions_at<P>(t, l, true, direction);
    for (int i = 0; i < elements(); i++) {
      T a = kept.square, b = kept.step;
      if constexpr (!P::in_lanes) {
        a = spread(a, i, size);
        b = spread(b, i, size);
      }
      // Looking ahead, a finite momentum may give an infinite direction, for a component that is out of range.
      if (!is_steady<P>()) direction[i] = select(abs(direction[i]) <= T(Limits<R>::largest), direction[i], T(R(0)));
      const int64_t at = weight_at<P>(i);
      put(w + at, fma(b, direction[i], a * T(load(w + at))));
    }
  }

  template <class P>
  MK_FN void store_lanes(void* weights, int l, const T* q) const {
    typename P::Number* const w = block_of<P>(static_cast<typename P::Number*>(weights), l);
    if constexpr (P::in_lanes) {
      for (int e = 0; e < elements(); e++) put(w + weight_at<P>(e), q[e]);
    } else {
      T x[Size::capacity];
      from_lanes(q, x, size);
      for (int i = 0; i < elements(); i++) put(w + weight_at<P>(i), x[i]);
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
    store_lanes<P>(t.w, l, y);
    return true;
  }
  // The same for a block with long turns and components out of range, which keep their weight.
  template <class P>
  __attribute__((noinline)) Mask<R> retract_rest(const Tile& t, int l, Mask<R> out, const Kept& kept) const {
    const int E = elements();
    const T scale = is_uniform<P>() ? scale0 : kept.scale;
    T x[Size::capacity], old[Size::capacity], q[Size::capacity];
    const typename P::Number* const w = block_of<P>(static_cast<const typename P::Number*>(t.w), l);
    for (int i = 0; i < E; i++) x[i] = load(w + weight_at<P>(i));
    bring<P>(x, old);
    for (int e = 0; e < E; e++) q[e] = kept.q[e];
    if constexpr (turns) {
      Map::retract_turn(q, kept.tangent, kept.step, kept.square, scale, size);
      out = out | !(square_norm(old, E) <= T(largest_square));
    } else {
      Map::retract(q, kept.tangent, kept.step, kept.square, size);
      for (int e = 0; e < E; e++) q[e] = q[e] * scale;
    }
    for (int e = 0; e < E; e++) q[e] = select(out, old[e], q[e]);
    store_lanes<P>(t.w, l, q);
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

  void put_back(const Tile& t, bool first, bool second, const uint8_t* skip, Memory& memory) const {
    if (!t.copied) return;
    if (!first) copy<R, Size, true>(job, job.weight, false, t.k, t.count, size, skip, memory.w);
    if (!second && momentum.buffered) copy<R, Size, true>(job, job.momentum, false, t.k, t.count, size, skip, memory.m);
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
        t.count = with_place<lag ? Body::whole : Body::general>(t, step);
        break;
      case Body::first:
        t.count = with_place<has_passes ? Body::first : Body::general>(t, add);
        break;
      case Body::second:
        t.count = with_place<has_passes ? Body::second : Body::general>(t, step);
        break;
      default:
        t.count = first ? with_place<Body::general>(t, add) : with_place<Body::general>(t, step);
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
      : job(job),
        size(size),
        width(width_of(elements())),
        momentum(momentum_of<R>(job)),
        step_size(step_size_of<R>(job)),
        native(job.storage == storage_of<S>),
        steady(momentum.buffer_is_direction() && !momentum.first && momentum.plain && native &&
               momentum.one_minus_dampening == R(1)),
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
