// The ordinary step of bfloat16 matrices, 32 at a time: two blocks of lanes.h, the even matrices and the odd ones. They
// come into lanes and leave them as they are stored (packed.h), and the stages are those of lanes.h.
//
// A pair with something that is not finite ends the run before it. One that needs more than a sane step's is done over
// by lanes.h, block by block, from its stored momentum; both ways give the same bits.
#pragma once

#include "cpu/lanes.h"
#include "cpu/packed.h"

namespace mk {
namespace MK_ISA {
namespace {

#if defined(__AVX512BW__)
// L: the Lanes that is stepped for.
template <class L>
class Pairs {
  using T = typename L::Arithmetic;
  using P = Place<false, BFloat16, Body::whole>;
  static constexpr int E = L::capacity, N = T::lanes;
  using Moves = Rotation32<E>;
  struct Kept {
    Packed w[L::is_linear ? 1 : E];  // in lanes
    typename L::Kept even, odd;
  };

  const L& lanes;
  const Pass& pass;
  const Tile& t;
  BFloat16 *const w, *const m;
  const BFloat16* const g;

  template <bool Odd>
  MK_FN void observe(const Packed* weights, const Packed* directions, typename L::Kept& kept) const {
    T q[E], d[E];
    for (int e = 0; e < E; e++) q[e] = half<Odd>(weights[e]);
    for (int e = 0; e < E; e++) d[e] = half<Odd>(directions[e]);
    lanes.observe(q, d, lanes.inverse0, kept);
  }

  static __attribute__((noinline)) bool are_finite(const Packed* weight, const Packed* direction) {
    Packed largest = _mm512_setzero_si512();
    for (int i = 0; i < E; i++)
      for (const Packed x : {weight[i], direction[i]})
        largest = _mm512_maskz_max_epu16(0xffffffff, largest, _mm512_and_si512(x, _mm512_set1_epi16(0x7fff)));
    return !_mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7f80));
  }

  // The stages for the pair at component l, as those of Lanes.
  MK_FN bool project(int64_t l, Kept& kept) const {
    const T mu = T(lanes.momentum.momentum);
    Packed weight[E], direction[E], lane[E], bits = _mm512_setzero_si512();
    for (int i = 0; i < E; i++) {
      const Packed gradient = load_packed(g + l * E + i * 2 * N), old = load_packed(m + l * E + i * 2 * N);
      direction[i] =
          packed({half<false>(gradient) + half<false>(old) * mu, half<true>(gradient) + half<true>(old) * mu});
      weight[i] = load_packed(w + l * E + i * 2 * N);
      bits = _mm512_or_si512(bits, _mm512_or_si512(direction[i], weight[i]));
    }
    // Numbers below 2, as nearly all are, have this bit of the exponent clear.
    if (_mm512_test_epi16_mask(bits, _mm512_set1_epi16(0x4000)) && !are_finite(weight, direction)) return false;
    for (int i = 0; i < E; i++) store_packed(m + l * E + i * 2 * N, direction[i]);
    Moves::to_lanes(direction, lane);
    Moves::to_lanes(weight, weight);
    observe<false>(weight, lane, kept.even);
    observe<true>(weight, lane, kept.odd);
    if constexpr (!L::is_linear)
      for (int e = 0; e < E; e++) kept.w[e] = weight[e];
    return true;
  }
  template <bool Odd>
  MK_FN auto retract(const Packed* weights, const typename L::Kept& kept, T* y) const {
    T q[E];
    for (int e = 0; e < E; e++) q[e] = L::turns ? half<Odd>(weights[e]) : half<Odd>(weights[e]) * lanes.inverse0;
    return lanes.retracted(q, kept, lanes.scale0, y);
  }
  MK_FN bool finish(int64_t l, const Kept& kept) const {
    Packed x[E];
    if constexpr (L::is_linear) {
      const Two keep{kept.even.square, kept.odd.square}, along{kept.even.step, kept.odd.step};
      for (int i = 0; i < E; i++) {
        const Packed weight = load_packed(w + l * E + i * 2 * N), direction = load_packed(m + l * E + i * 2 * N);
        const Two a = spread<E>(keep, i), b = spread<E>(along, i);
        x[i] = packed({fma(b.even, half<false>(direction), a.even * half<false>(weight)),
                       fma(b.odd, half<true>(direction), a.odd * half<true>(weight))});
      }
    } else {
      T even[E], odd[E];
      const auto good = retract<false>(kept.w, kept.even, even) & retract<true>(kept.w, kept.odd, odd);
      if (any(!good)) return false;
      for (int e = 0; e < E; e++) x[e] = packed({even[e], odd[e]});
      Moves::from_lanes(x, x);
    }
    for (int i = 0; i < E; i++) store_packed(w + l * E + i * 2 * N, x[i]);
    return true;
  }

 public:
  Pairs(const L& lanes, const Pass& pass, const Tile& t)
      : lanes(lanes),
        pass(pass),
        t(t),
        w(static_cast<BFloat16*>(t.w)),
        m(static_cast<BFloat16*>(t.m)),
        g(static_cast<const BFloat16*>(t.g)) {}

  // Returns how many blocks were stepped.
  MK_FN int run(typename L::Work& work, bool& any_out) const {
    Kept ring[4];
    int pairs = t.count / (2 * N);
    for (int b = 0; b < pairs + 2; b++) {
      if (b < pairs && !project(b * 2 * N, ring[b % 4])) pairs = b;
      if (const int s = b - 1; s >= 0 && s < pairs) {
        work.out[2 * s] = lanes.template find_step<P>(pass, t, 2 * s * N, ring[s % 4].even);
        work.out[2 * s + 1] = lanes.template find_step<P>(pass, t, (2 * s + 1) * N, ring[s % 4].odd);
      }
      if (const int r = b - 2; r >= 0 && r < pairs) {
        if (any(work.out[2 * r] | work.out[2 * r + 1]) || !finish(2 * r * N, ring[r % 4]))
          any_out |=
              lanes.template step_over<P>(pass, t, 2 * r, work) | lanes.template step_over<P>(pass, t, 2 * r + 1, work);
      }
    }
    return 2 * pairs;
  }
};
#endif

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
