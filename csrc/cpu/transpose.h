// From N matrices of E elements each, one after the other in E registers, to E registers with one lane a matrix, and back.
//
// Where gcd(E, N) = 1, lane l's element j sits at position (9 l + j) mod N of some register (E = 9), another position for
// every l: row j is put together by masked blends of the E registers, one permutation brings it into order. That is far
// cheaper than gathers. Other sizes go through memory.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/pack.h"
#include "size.h"

namespace mk {
namespace MK_ISA {
namespace {

template <class R>
constexpr bool has_permutation = register_bytes == 64 || (register_bytes == 32 && sizeof(R) == 4);

// Index vectors of row J: `from[l]` is where lane l's element sits, `to` the inverse.
template <class R, int E, int J>
struct Row {
  using Index = decltype(typename Vectors<R>::mask{});
  static constexpr int N = Pack<R>::lanes;
  struct Table {
    alignas(64) typename std::conditional<sizeof(R) == 4, int32_t, int64_t>::type from[N], to[N];
  };
  static constexpr Table make() {
    Table t{};
    for (int l = 0; l < N; l++) {
      t.from[l] = (E * l + J) % N;
      t.to[(E * l + J) % N] = l;
    }
    return t;
  }
  static constexpr Table table = make();
  // Positions of register K that belong to row J.
  static constexpr unsigned positions(int K) {
    unsigned mask = 0;
    for (int l = 0; l < N; l++)
      if ((E * l + J) / N == K) mask |= 1u << ((E * l + J) % N);
    return mask;
  }
};

template <unsigned Mask, class R>
MK_FN Pack<R> blend(Pack<R> a, Pack<R> b) {
  if constexpr (Mask == 0) return a;
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) return Pack<R>(_mm512_mask_mov_ps(a.v, __mmask16(Mask), b.v));
  if constexpr (sizeof(R) == 8) return Pack<R>(_mm512_mask_mov_pd(a.v, __mmask8(Mask), b.v));
#elif defined(__AVX2__)
  if constexpr (sizeof(R) == 4) return Pack<R>(_mm256_blend_ps(a.v, b.v, int(Mask)));
#endif
  return a;
}

template <class R, class I>
MK_FN Pack<R> permute(Pack<R> x, const I* index) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) return Pack<R>(_mm512_permutexvar_ps(_mm512_load_si512(index), x.v));
  if constexpr (sizeof(R) == 8) return Pack<R>(_mm512_permutexvar_pd(_mm512_load_si512(index), x.v));
#elif defined(__AVX2__)
  if constexpr (sizeof(R) == 4) return Pack<R>(_mm256_permutevar8x32_ps(x.v, _mm256_load_si256((const __m256i*)index)));
#endif
  return x;
}

template <int E, int J, class R, int... K>
MK_FN Pack<R> to_lane(const Pack<R>* rows, std::integer_sequence<int, K...>) {
  Pack<R> x = rows[0];
  ((x = blend<Row<R, E, J>::positions(K)>(x, rows[K])), ...);
  return permute(x, Row<R, E, J>::table.from);
}

template <int E, int K, class R, int... J>
MK_FN Pack<R> to_row(const Pack<R>* scattered, std::integer_sequence<int, J...>) {
  Pack<R> x = scattered[0];
  ((x = blend<Row<R, E, J>::positions(K)>(x, scattered[J])), ...);
  return x;
}

template <int E, class R, int... J>
MK_FN void to_lanes(const Pack<R>* rows, Pack<R>* x, std::integer_sequence<int, J...> all) {
  ((x[J] = to_lane<E, J>(rows, all)), ...);
}

template <int E, class R, int... J>
MK_FN void to_rows(const Pack<R>* x, Pack<R>* rows, std::integer_sequence<int, J...> all) {
  Pack<R> scattered[E];
  ((scattered[J] = permute(x[J], Row<R, E, J>::table.to)), ...);
  ((rows[J] = to_row<E, J>(scattered, all)), ...);
}

template <class Size, class R>
constexpr bool in_registers = !std::is_same<Size, Dynamic>::value && has_permutation<R> && Size::capacity % 2 == 1 &&
                              (Size::capacity > 1);

template <class R, class Size>
MK_FN void to_lanes(const Pack<R>* rows, Pack<R>* x, Size size) {
  constexpr int N = Pack<R>::lanes;
  if constexpr (in_registers<Size, R>) {
    to_lanes<Size::capacity>(rows, x, std::make_integer_sequence<int, Size::capacity>());
  } else {
    const int E = size.n * size.p;
    R memory[Size::capacity * N];
    for (int e = 0; e < E; e++) rows[e].store(memory + e * N);
    for (int e = 0; e < E; e++)
      for (int l = 0; l < N; l++) x[e].v[l] = memory[l * E + e];
  }
}

template <class R, class Size>
MK_FN void to_rows(const Pack<R>* x, Pack<R>* rows, Size size) {
  constexpr int N = Pack<R>::lanes;
  if constexpr (in_registers<Size, R>) {
    to_rows<Size::capacity>(x, rows, std::make_integer_sequence<int, Size::capacity>());
  } else {
    const int E = size.n * size.p;
    R memory[Size::capacity * N];
    for (int e = 0; e < E; e++)
      for (int l = 0; l < N; l++) memory[l * E + e] = x[e].v[l];
    for (int e = 0; e < E; e++) rows[e] = Pack<R>::load(memory + e * N);
  }
}

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
