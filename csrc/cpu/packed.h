// Registers of 32 bfloat16 numbers, as they are stored, and matrices of them in lanes: half of the moves that floats
// take. A register is widened to two of floats by a shift and a mask, the even places and the odd ones.
#pragma once

#include "cpu/storage.h"
#include "cpu/transpose.h"

namespace mk {
namespace MK_ISA {
namespace {

// A register's numbers as floats.
struct Two {
  Pack<float> even, odd;
};

#if defined(__AVX512BW__)
constexpr bool has_packed = true;
// A register of 32 numbers of 16 bits.
using Packed = __m512i;
MK_FN Packed load_packed(const void* p) { return _mm512_loadu_si512(p); }
MK_FN void store_packed(void* p, Packed x) { _mm512_storeu_si512(p, x); }

// The even places or the odd ones.
template <bool Odd>
MK_FN Pack<float> half(Packed x) {
  const Packed bits =
      Odd ? _mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000))) : _mm512_maskz_slli_epi32(0xffff, x, 16);
  return Pack<float>(_mm512_castsi512_ps(bits));
}
// Rounded to nearest even as put() does it, but for NaN, which stays one only if its payload is in the upper half, as
// it is in sums and products of numbers of 16 bits. Upper and lower halves are packed first, and half as many registers
// rounded: upwards where the lower half is above 0x8000, or is that and the upper half odd.
MK_FN Packed packed(Two x) {
  const Packed even = _mm512_castps_si512(x.even.v), odd = _mm512_castps_si512(x.odd.v);
  const Packed upper = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_maskz_srli_epi32(0xffff, even, 16), odd);
  const Packed lower = _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_maskz_slli_epi32(0xffff, odd, 16));
  const Packed one = _mm512_set1_epi16(1);
  const Packed rest = _mm512_ternarylogic_epi32(lower, upper, one, 0xf8);  // lower | (upper & 1)
  const __mmask32 upwards = _mm512_cmpgt_epu16_mask(rest, _mm512_set1_epi16(int16_t(0x8000)));
  return _mm512_mask_add_epi16(upper, upwards, upper, one);
}

// Rotation16 (transpose.h) for 32 matrices: five rounds for five bits of a place.
template <int E>
class Rotation32 {
  static constexpr int relabel = inverse_modulo(32 % E, E);
  struct Moves {
    alignas(64) uint16_t from[E][32];
    constexpr explicit Moves(int sign) : from{} {
      for (int j = 0; j < E; j++)
        for (int s = 0; s < 32; s++) from[j][s] = uint16_t((s + sign * j + 32) % 32);
    }
  };
  template <int Bit, int Sign>
  MK_FN static void stage(Packed* u) {
    constexpr __mmask32 places = Bit == 1   ? 0xaaaaaaaa
                                 : Bit == 2 ? 0xcccccccc
                                 : Bit == 4 ? 0xf0f0f0f0
                                 : Bit == 8 ? 0xff00ff00
                                            : 0xffff0000;
    Packed v[E];
    for (int t = 0; t < E; t++) v[t] = _mm512_mask_blend_epi16(places, u[t], u[(t + Sign * Bit + 32 * E) % E]);
    for (int t = 0; t < E; t++) u[t] = v[t];
  }
  template <int Sign>
  MK_FN static void align(Packed* u) {
    static constexpr Moves moves(Sign);
    for (int j = 1; j < E; j++)
      u[j] = _mm512_maskz_permutexvar_epi16(0xffffffff, _mm512_load_si512(moves.from[j]), u[j]);
  }

 public:
  // Place p of a register in lanes has matrix p * stride modulo 32.
  static constexpr int stride = inverse_modulo(E, 32);

  MK_FN static void to_lanes(const Packed* in_memory, Packed* x) {
    Packed u[E];
    for (int t = 0; t < E; t++) u[t] = in_memory[t * relabel % E];
    stage<1, -1>(u);
    stage<2, -1>(u);
    stage<4, -1>(u);
    stage<8, -1>(u);
    stage<16, -1>(u);
    align<1>(u);
    for (int t = 0; t < E; t++) x[t] = u[t];
  }
  MK_FN static void from_lanes(const Packed* x, Packed* in_memory) {
    Packed u[E];
    for (int t = 0; t < E; t++) u[t] = x[t];
    align<-1>(u);
    stage<1, 1>(u);
    stage<2, 1>(u);
    stage<4, 1>(u);
    stage<8, 1>(u);
    stage<16, 1>(u);
    for (int t = 0; t < E; t++) in_memory[t * relabel % E] = u[t];
  }
};

// For the two halves of register i of 32 matrices in memory, the numbers that `x` has for each place's matrix.
template <int E>
struct SpreadTwo {
  alignas(64) int32_t lane[E][2][16];
  constexpr SpreadTwo() : lane{} {
    for (int i = 0; i < E; i++)
      for (int half = 0; half < 2; half++)
        for (int s = 0; s < 16; s++) {
          const int place = (i * 32 + 2 * s + half) / E * E % 32;  // E: the inverse of the stride
          lane[i][half][s] = place / 2 + place % 2 * 16;
        }
  }
};
template <int E>
MK_FN Two spread(Two x, int i) {
  static constexpr SpreadTwo<E> from;
  const auto half = [&](int h) {
    return Pack<float>(_mm512_maskz_permutex2var_ps(0xffff, x.even.v, _mm512_load_si512(from.lane[i][h]), x.odd.v));
  };
  return {half(0), half(1)};
}
#else
constexpr bool has_packed = false;
#endif

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
