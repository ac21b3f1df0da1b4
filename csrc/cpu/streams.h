// The ordinary step of matrices in lanes already, as channels_last weights lie: element e of neighbouring matrices is a
// stream of its own, three streams an element with gradient and momentum.
//
// Streams of a power of two of channels lie a power of two apart, so that the lines of one block meet in one set of the
// first-level cache, which holds 8 of 27. So a few blocks are brought at a time, stream by stream: while the lines of a
// stream are at hand, its momentum is stepped and stored, and weight and direction go into scratch that stays in the
// cache, where the stages take them. What comes two times later is asked for at the same time, for the hardware follows
// no stream beyond its page.
#pragma once

#include "cpu/lanes.h"

namespace mk {
namespace MK_ISA {
namespace {

// L: the Lanes that is stepped for; S: the storage, which is stepped in place.
template <class L, class S>
class Streams {
  using T = typename L::Arithmetic;
  using P = Place<true, S, Body::whole>;
  static constexpr int E = L::capacity, N = T::lanes;
  static constexpr int at_once = 4, ahead = 2;  // blocks that are brought together; how many times later prefetched
  static constexpr int ring = 2 * at_once;

  struct alignas(64) Scratch {
    T w[ring][E], d[ring][E];
    S old[at_once][E][N];  // momentum
  };

  const L& lanes;
  const Pass& pass;
  const Tile& t;
  S *const w, *const m;
  const S* const g;
  int64_t next_w, next_g;  // where the tile after this one starts

  // The `count` blocks from `block` on. False, with the old momentum in its place, where something is not finite.
  MK_FN bool bring(int block, int count, Scratch& scratch) const {
    const T mu = T(lanes.momentum.momentum);
    const int64_t l = int64_t(block) * N, later = l + ahead * at_once * N;
    const int64_t later_w = later < t.count ? later : next_w + later - t.count;
    const int64_t later_g = later < t.count ? later : next_g + later - t.count;
    const int first = block % ring;
    T sum[at_once];
    for (int b = 0; b < at_once; b++) sum[b] = T(0);
    for (int e = 0; e < E; e++) {
      const int64_t at = lanes.job.weight_offset[e], grad_at = lanes.job.grad_offset[e];
      for (int b = 0; b < at_once; b++) {
        if (b >= count) break;
        S* const buffer = m + at + l + b * N;
        __builtin_memcpy(scratch.old[b][e], buffer, sizeof(scratch.old[b][e]));
        const T weight = load(w + at + l + b * N);
        const T direction = as_stored<S>(T(load(g + grad_at + l + b * N)) + T(load(buffer)) * mu);
        store_exact(buffer, direction);
        scratch.w[first + b][e] = weight;
        scratch.d[first + b][e] = direction;
        sum[b] = fma(direction, weight, sum[b]);
        __builtin_prefetch(w + at + later_w + b * N, 0, 2);
        __builtin_prefetch(m + at + later_w + b * N, 0, 2);
        __builtin_prefetch(g + grad_at + later_g + b * N, 0, 2);
      }
    }
    bool good = true;
    for (int b = 0; b < count; b++) good &= !any(!(abs(sum[b]) <= T(Limits<Real<T>>::largest)));
    if (good) return true;
    for (int b = 0; b < count; b++)
      for (int e = 0; e < E; e++)
        __builtin_memcpy(m + lanes.job.weight_offset[e] + l + b * N, scratch.old[b][e], sizeof(scratch.old[b][e]));
    return false;
  }

  // The third stage. False, with nothing done, where it takes more than a sane step's.
  MK_FN bool finish(int64_t l, const Scratch& scratch, const typename L::Kept& kept) const {
    const T *const weight = scratch.w[l / N % ring], *const direction = scratch.d[l / N % ring];
    T q[E], y[E];
    if constexpr (L::is_linear) {
      for (int e = 0; e < E; e++) y[e] = fma(kept.step, direction[e], kept.square * weight[e]);
    } else {
      for (int e = 0; e < E; e++) q[e] = L::turns ? weight[e] : weight[e] * lanes.inverse0;
      if (any(!lanes.retracted(q, kept, lanes.scale0, y))) return false;
    }
    for (int e = 0; e < E; e++) put(w + lanes.job.weight_offset[e] + l, y[e]);
    return true;
  }

 public:
  Streams(const L& lanes, const Pass& pass, const Tile& t)
      : lanes(lanes),
        pass(pass),
        t(t),
        w(static_cast<S*>(t.w)),
        m(static_cast<S*>(t.m)),
        g(static_cast<const S*>(t.g)),
        next_w(0),
        next_g(0) {
    if (const int64_t next = t.k + t.count; next < lanes.job.count) {
      const Run here = run_at(lanes.job, t.k, lanes.job.count), there = run_at(lanes.job, next, lanes.job.count);
      next_w = there.weight - here.weight;
      next_g = there.grad - here.grad;
    }
  }

  // Returns how many components were stepped: all, or those before the blocks with something that is not finite.
  MK_FN int run(typename L::Work& work, bool& any_out) const {
    Scratch scratch;
    int blocks = t.count / N;
    for (int b = 0; b < blocks + 2; b++) {
      if (b % at_once == 0 && b < blocks) {
        const int count = blocks - b < at_once ? blocks - b : at_once;
        if (!bring(b, count, scratch)) blocks = b;
      }
      if (b < blocks) {
        T q[E];
        for (int e = 0; e < E; e++) q[e] = scratch.w[b % ring][e];
        lanes.observe(q, scratch.d[b % ring], lanes.inverse0, work.kept[b % L::kept_blocks]);
      }
      if (const int s = b - 1; s >= 0 && s < blocks)
        work.out[s] = lanes.template find_step<P>(pass, t, s * N, work.kept[s % L::kept_blocks]);
      if (const int r = b - 2; r >= 0 && r < blocks) {
        if (any(work.out[r]) || !finish(int64_t(r) * N, scratch, work.kept[r % L::kept_blocks]))
          any_out |= lanes.template step_over<P>(pass, t, r, work);
      }
    }
    return blocks * N;
  }
};

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
