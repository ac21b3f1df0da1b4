// Between N matrices of E elements, one after the other in memory, and E registers with one lane a matrix.
//
// Floats go eight elements at a time through 8 x 8 transpositions in registers (three shuffles an element of the matrix
// and register); all odd squares leave one element over, which is collected by itself. Measured against masked blends
// of whole registers with one permutation a row: those need a constant mask for every blend, which costs more than the
// blend.
#pragma once

#include <type_traits>

#include "cpu/pack.h"
#include "size.h"

namespace mk {
namespace MK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr bool has_eights = true;

MK_FN __m512 two(const float* low, const float* high) {
  return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castps_pd(_mm512_castps256_ps512(_mm256_loadu_ps(low))),
                                             _mm256_castps_pd(_mm256_loadu_ps(high)), 1));
}

// 4 x 4 transpositions inside the 128-bit parts.
MK_FN void fours(__m512& a, __m512& b, __m512& c, __m512& d) {
  const __m512 s = _mm512_unpacklo_ps(a, b), t = _mm512_unpackhi_ps(a, b), u = _mm512_unpacklo_ps(c, d),
               v = _mm512_unpackhi_ps(c, d);
  a = _mm512_shuffle_ps(s, u, 0x44);
  b = _mm512_shuffle_ps(s, u, 0xee);
  c = _mm512_shuffle_ps(t, v, 0x44);
  d = _mm512_shuffle_ps(t, v, 0xee);
}

// Elements 0 … 7 of 16 matrices that are E apart.
MK_FN void load_eight(const float* p, int E, Pack<float>* x) {
  __m512 a[4], b[4];
  for (int i = 0; i < 4; i++) a[i] = two(p + i * E, p + (4 + i) * E);
  for (int i = 0; i < 4; i++) b[i] = two(p + (8 + i) * E, p + (12 + i) * E);
  fours(a[0], a[1], a[2], a[3]);
  fours(b[0], b[1], b[2], b[3]);
  for (int i = 0; i < 4; i++) {
    x[i].v = _mm512_shuffle_f32x4(a[i], b[i], 0x88);
    x[4 + i].v = _mm512_shuffle_f32x4(a[i], b[i], 0xdd);
  }
}

MK_FN void store_eight(const Pack<float>* x, float* p, int E) {
  __m512 a[4], b[4];
  for (int i = 0; i < 4; i++) {
    a[i] = x[i].v;
    b[i] = x[4 + i].v;
  }
  fours(a[0], a[1], a[2], a[3]);
  fours(b[0], b[1], b[2], b[3]);
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int i = 0; i < 4; i++) {
    const __m512d first = _mm512_castps_pd(a[i]), second = _mm512_castps_pd(b[i]);
    const __m512d l = _mm512_permutex2var_pd(first, low, second), h = _mm512_permutex2var_pd(first, high, second);
    _mm256_storeu_pd(reinterpret_cast<double*>(p + i * E), _mm512_castpd512_pd256(l));
    _mm256_storeu_pd(reinterpret_cast<double*>(p + (4 + i) * E), _mm512_extractf64x4_pd(l, 1));
    _mm256_storeu_pd(reinterpret_cast<double*>(p + (8 + i) * E), _mm512_castpd512_pd256(h));
    _mm256_storeu_pd(reinterpret_cast<double*>(p + (12 + i) * E), _mm512_extractf64x4_pd(h, 1));
  }
}

#elif defined(__AVX2__)
constexpr bool has_eights = true;

MK_FN void eights(__m256* r) {
  __m256 t[8];
  for (int h = 0; h < 8; h += 4) {
    const __m256 s = _mm256_unpacklo_ps(r[h], r[h + 1]), u = _mm256_unpackhi_ps(r[h], r[h + 1]),
                 v = _mm256_unpacklo_ps(r[h + 2], r[h + 3]), w = _mm256_unpackhi_ps(r[h + 2], r[h + 3]);
    t[h] = _mm256_shuffle_ps(s, v, 0x44);
    t[h + 1] = _mm256_shuffle_ps(s, v, 0xee);
    t[h + 2] = _mm256_shuffle_ps(u, w, 0x44);
    t[h + 3] = _mm256_shuffle_ps(u, w, 0xee);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x20);
    r[4 + i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x31);
  }
}

MK_FN void load_eight(const float* p, int E, Pack<float>* x) {
  __m256 r[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(p + i * E);
  eights(r);
  for (int i = 0; i < 8; i++) x[i].v = r[i];
}

MK_FN void store_eight(const Pack<float>* x, float* p, int E) {
  __m256 r[8];
  for (int i = 0; i < 8; i++) r[i] = x[i].v;
  eights(r);
  for (int i = 0; i < 8; i++) _mm256_storeu_ps(p + i * E, r[i]);
}

#else
constexpr bool has_eights = false;
MK_FN void load_eight(const float*, int, Pack<float>*) {}
MK_FN void store_eight(const Pack<float>*, float*, int) {}
#endif

template <class R, class Size>
MK_FN void to_lanes(const R* p, Pack<R>* x, Size size) {
  const int E = size.n * size.p;
  int e = 0;
  if constexpr (has_eights && std::is_same<R, float>::value) {
    for (; e + 8 <= E; e += 8) load_eight(p + e, E, x + e);
  }
  for (; e < E; e++)
    for (int l = 0; l < Pack<R>::lanes; l++) x[e].v[l] = p[l * E + e];
}

template <class R, class Size>
MK_FN void from_lanes(const Pack<R>* x, R* p, Size size) {
  const int E = size.n * size.p;
  int e = 0;
  if constexpr (has_eights && std::is_same<R, float>::value) {
    for (; e + 8 <= E; e += 8) store_eight(x + e, p + e, E);
  }
  for (; e < E; e++) {
    R one[Pack<R>::lanes];
    x[e].store(one);
    for (int l = 0; l < Pack<R>::lanes; l++) p[l * E + e] = one[l];
  }
}

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
