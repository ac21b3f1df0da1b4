// Between N matrices of E elements, one after the other in memory, and E registers with one lane a matrix.
//
// With AVX-512, floats of odd matrices of a known size are rotated in registers (Rotation16), all of a block at once
// or, where a block has more registers than there are, one after the other. Others go eight elements at a time through
// 8 x 8 transpositions, three shuffles an element of the matrix and register, and the rest one by one.
#pragma once

#include <type_traits>
#include <utility>

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

#if defined(__AVX512F__)
constexpr int inverse_modulo(int a, int m) {
  for (int x = 1; x < m; x++)
    if (a * x % m == 1) return x;
  return 0;
}

// Odd E, all in registers. Number e of a block lies in place e % 16 of register e / 16, and the numbers of one place
// belong to all elements in turn: to bring element j of every matrix into register j, each place has to rotate by as
// many registers as its own number, once the registers are relabelled: four rounds of blends, one for each bit of the
// place, with the same four masks for all registers. Then the places of register j are j out of step with those of
// register 0.
template <int E>
class Rotation16 {
  static constexpr int relabel = inverse_modulo(16 % E, E);

  template <int Bit, int Sign>
  MK_FN static void stage(Pack<float>* u) {
    constexpr __mmask16 places = Bit == 1 ? 0xaaaa : Bit == 2 ? 0xcccc : Bit == 4 ? 0xf0f0 : 0xff00;
    Pack<float> v[E];
    for (int t = 0; t < E; t++) v[t].v = _mm512_mask_mov_ps(u[t].v, places, u[(t + Sign * Bit + 16 * E) % E].v);
    for (int t = 0; t < E; t++) u[t] = v[t];
  }
  template <int Places>
  MK_FN static __m512 shifted(__m512 x) {
    if constexpr (Places == 0) return x;
    return _mm512_castsi512_ps(
        _mm512_maskz_alignr_epi32(0xffff, _mm512_castps_si512(x), _mm512_castps_si512(x), (Places + 16) % 16));
  }
  template <int Sign, int... J>
  MK_FN static void align(Pack<float>* u, std::integer_sequence<int, J...>) {
    ((u[J].v = shifted<Sign*(J % 16)>(u[J].v)), ...);
  }

  // The same for more registers than there are: one after the other is read once, goes through all rounds with the last
  // 1, 2, 4 and 8 of those before it, and is handed over. Round by round, each would be stored and read four times.
  struct Sliding {
    __m512 u[E + 15], v[E + 15], w[E + 15], x[E + 15];
    template <int I, class In, class Out>
    MK_FN void next(const In& in, const Out& out, std::integral_constant<int, I>) {
      u[I] = in(std::integral_constant<int, I>{});
      if constexpr (I >= 1) v[I] = _mm512_mask_mov_ps(u[I], 0xaaaa, u[I - 1]);
      if constexpr (I >= 3) w[I] = _mm512_mask_mov_ps(v[I], 0xcccc, v[I - 2]);
      if constexpr (I >= 7) x[I] = _mm512_mask_mov_ps(w[I], 0xf0f0, w[I - 4]);
      if constexpr (I >= 15) out(std::integral_constant<int, I>{}, _mm512_mask_mov_ps(x[I], 0xff00, x[I - 8]));
    }
  };
  template <class In, class Out, int... I>
  MK_FN static void slide(const In& in, const Out& out, std::integer_sequence<int, I...>) {
    Sliding sliding;
    (sliding.next(in, out, std::integral_constant<int, I>{}), ...);
  }
  using Steps = std::make_integer_sequence<int, E + 15>;
  static constexpr bool slides = E > 16;

 public:
  // As slide_to_lanes().
  template <class Load, class Meanwhile>
  MK_FN static void to_lanes(const Load& load, Pack<float>* x, const Meanwhile& meanwhile) {
    const auto in = [&](auto i) { return load((i + 2 * E - 15) % E * relabel % E).v; };
    const auto out = [&](auto i, __m512 y) {
      constexpr int t = decltype(i)::value - 15;
      x[t].v = shifted<t % 16>(y);
      meanwhile(t);
    };
    slide(in, out, Steps{});
  }
  MK_FN static void to_lanes(const Pack<float>* in_memory, Pack<float>* x) {
    if constexpr (slides) {
      to_lanes([&](int i) { return in_memory[i]; }, x, [](int) {});
    } else {
      Pack<float> u[E];
      for (int t = 0; t < E; t++) u[t] = in_memory[t * relabel % E];
      stage<1, -1>(u);
      stage<2, -1>(u);
      stage<4, -1>(u);
      stage<8, -1>(u);
      align<1>(u, std::make_integer_sequence<int, E>{});
      for (int t = 0; t < E; t++) x[t] = u[t];
    }
  }
  MK_FN static void from_lanes(const Pack<float>* x, Pack<float>* in_memory) {
    if constexpr (slides) {  // backwards, for registers take from those behind them
      const auto in = [&](auto i) {
        constexpr int t = (2 * E + 14 - decltype(i)::value) % E;
        return shifted<-(t % 16)>(x[t].v);
      };
      slide(in, [&](auto i, __m512 y) { in_memory[(E + 14 - i) * relabel % E].v = y; }, Steps{});
    } else {
      Pack<float> u[E];
      for (int t = 0; t < E; t++) u[t] = x[t];
      align<-1>(u, std::make_integer_sequence<int, E>{});
      stage<1, 1>(u);
      stage<2, 1>(u);
      stage<4, 1>(u);
      stage<8, 1>(u);
      for (int t = 0; t < E; t++) in_memory[t * relabel % E] = u[t];
    }
  }
};

template <class R, class Size>
constexpr bool rotates =
    std::is_same<R, float>::value && !std::is_same<Size, Dynamic>::value && Size::capacity % 2 == 1;
// Whether that goes register by register.
template <class R, class Size>
constexpr bool slides = rotates<R, Size> && Size::capacity > 16;
#else
template <class R, class Size>
constexpr bool rotates = false;
template <class R, class Size>
constexpr bool slides = false;
#endif

// Which matrix of a block a lane has: lane l has matrix l * stride modulo the number of lanes.
struct LaneOrder {
  int stride;
  template <class R>
  MK_FN int component(int lane) const {
    return lane * stride % Pack<R>::lanes;
  }
};

template <class R, class Size>
MK_FN LaneOrder lane_order(Size) {
#if defined(__AVX512F__)
  if constexpr (rotates<R, Size>) return {inverse_modulo(Size::capacity, Pack<R>::lanes)};
#endif
  return {1};
}

// A block that slides: load(i) is its register i as it lies in memory, and meanwhile(i) is done once for each of them.
template <class R, class Size, class Load, class Meanwhile>
MK_FN void slide_to_lanes([[maybe_unused]] const Load& load, [[maybe_unused]] Pack<R>* x,
                          [[maybe_unused]] const Meanwhile& meanwhile, Size) {
#if defined(__AVX512F__)
  if constexpr (slides<R, Size>) Rotation16<Size::capacity>::to_lanes(load, x, meanwhile);
#endif
}

// A block as it lies in memory, a register after the other, with one matrix a lane.
template <class R, class Size>
MK_FN void to_lanes(const Pack<R>* in_memory, Pack<R>* x, Size size) {
#if defined(__AVX512F__)
  if constexpr (rotates<R, Size>) return Rotation16<Size::capacity>::to_lanes(in_memory, x);
#endif
  const R* p = reinterpret_cast<const R*>(in_memory);
  const int E = size.n * size.p;
  int e = 0;
  if constexpr (has_eights && std::is_same<R, float>::value) {
    for (; e + 8 <= E; e += 8) load_eight(p + e, E, x + e);
  }
  for (; e < E; e++) {
    R one[Pack<R>::lanes];
    for (int l = 0; l < Pack<R>::lanes; l++) one[l] = p[l * E + e];
    x[e] = Pack<R>::load(one);
  }
}

template <class R, class Size>
MK_FN void from_lanes(const Pack<R>* x, Pack<R>* in_memory, Size size) {
#if defined(__AVX512F__)
  if constexpr (rotates<R, Size>) return Rotation16<Size::capacity>::from_lanes(x, in_memory);
#endif
  R* p = reinterpret_cast<R*>(in_memory);
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

// Register i of a block in memory with, in each place, the number that `x` has for the place's matrix.
template <class R, class Size>
struct Spread {
  static constexpr int N = Pack<R>::lanes;
  alignas(register_bytes) int32_t lane[Size::capacity][N];
  constexpr Spread() : lane{} {
    const int stride = rotates<R, Size> ? Size::capacity % N : 1;  // the inverse of lane_order's
    for (int i = 0; i < Size::capacity; i++)
      for (int s = 0; s < N; s++) lane[i][s] = (i * N + s) / Size::capacity * stride % N;
  }
};
template <class R, class Size>
MK_FN Pack<R> spread(Pack<R> x, int i, Size) {
  static constexpr Spread<R, Size> from;
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4)
    return Pack<R>(_mm512_maskz_permutexvar_ps(0xffff, _mm512_load_si512(from.lane[i]), x.v));
#elif defined(__AVX2__)
  if constexpr (sizeof(R) == 4)
    return Pack<R>(_mm256_permutevar8x32_ps(x.v, _mm256_load_si256((const __m256i*)from.lane[i])));
#endif
  Pack<R> y;
  for (int s = 0; s < Pack<R>::lanes; s++) y.v[s] = x.v[from.lane[i][s]];
  return y;
}

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
