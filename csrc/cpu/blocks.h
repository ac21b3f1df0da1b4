// Blocks of small matrices: a register full of them, one after the other in a tile, and one a lane. What is stepped
// along comes from here, too, since most of it is stored.
#pragma once

#include "cpu/packed.h"
#include "cpu/tile.h"
#include "cpu/transpose.h"

namespace mk {
namespace MK_ISA {
namespace {

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

// R is the arithmetic type and S the storage that is stepped in place; all else is converted where a tile is copied.
template <class R, class Size, class S>
class Blocks {
 protected:
  using T = Pack<R>;
  static constexpr int N = T::lanes;
  // channels_last tiles are stepped in place at the sizes of size.h; a second body for all others would not pay.
  static constexpr bool is_fixed = !std::is_same<Size, Dynamic>::value;
  static constexpr int longest = 64;  // blocks of a tile
  using Memory = TileMemory<R, Size::capacity>;

  const Job& job;
  const Size size;
  const int width;  // components of a copied tile
  const Momentum<R> momentum;
  const bool native;  // storage is S
  const bool steady;

  Blocks(const Job& job, Size size)
      : job(job),
        size(size),
        width(width_of(elements())),
        momentum(momentum_of<R>(job)),
        native(job.storage == storage_of<S>),
        steady(momentum.buffer_is_direction() && !momentum.first && momentum.plain && native &&
               momentum.one_minus_dampening == R(1)) {}

  // Of a component; a constant where the size is one.
  MK_FN int elements() const { return size.n * size.p; }

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

  void put_back(const Tile& t, bool first, bool second, const uint8_t* skip, Memory& memory) const {
    if (!t.copied) return;
    if (!first) copy<R, Size, true>(job, job.weight, false, t.k, t.count, size, skip, memory.w);
    if (!second && momentum.buffered) copy<R, Size, true>(job, job.momentum, false, t.k, t.count, size, skip, memory.m);
  }

  // Buffers exist and nothing is negated, looked ahead or damped.
  template <class P>
  MK_FN bool is_steady() const {
    return P::ordinary || steady;
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
    const Number* const g = block_of<P>(static_cast<const Number*>(t.g), l);
    const Number* const buffers = block_of<P>(static_cast<const Number*>(t.m), l);
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
    const Number* const g = block_of<P>(static_cast<const Number*>(t.g), l);
    const Number* const m = block_of<P>(static_cast<const Number*>(t.m), l);
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

  // The sum of direction times weight, as it lies.
  template <class P>
  MK_FN T product_with_weight(const T* direction, const R* w) const {
    T sums[4] = {T(R(0)), T(R(0)), T(R(0)), T(R(0))};
    for (int i = 0; i < elements(); i++) sums[i % 4] = fma(direction[i], T::load(w + i * N), sums[i % 4]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  template <class P>
  MK_FN void bring_large(const Tile& t, int l, const T* direction, T* d, T* q) const {
    const R* const w = block_of<P>(static_cast<const R*>(t.w), l);
    const R* const next_w = block_of<P>(static_cast<const R*>(t.w), l + N);
    const R* const next_g = block_of<P>(static_cast<const R*>(t.g), l + N);
    const R* const next_m = block_of<P>(static_cast<const R*>(t.m), l + N);
    const auto ask = [](const R* at) { __builtin_prefetch(at, 0, 2); };  // into the second level
    const auto ask_for_direction = [&](int i) {
      ask(next_g + i * N);
      ask(next_m + i * N);
    };
    slide_to_lanes([&](int i) { return direction[i]; }, d, ask_for_direction, size);
    slide_to_lanes([&](int i) { return T::load(w + i * N); }, q, [&](int i) { ask(next_w + i * N); }, size);
  }

  LaneOrder order_of(const Tile& t) const { return t.in_lanes ? LaneOrder{1} : lane_order<R>(size); }

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
};

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
