// A SIMD register as a lane type. Compiled once per instruction set, in a namespace of its own.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

#include "lane.h"
#include "linalg/sine.h"

namespace mk {
namespace MK_ISA {

using mk::abs;
using mk::any;
using mk::fma;
using mk::max;
using mk::min;
using mk::reciprocal;
using mk::root;
using mk::select;
using mk::sine_cosine;
using mk::sqrt;

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX2__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif

template <class R>
struct Vectors;
template <>
struct Vectors<float> {
  typedef float numbers __attribute__((vector_size(register_bytes)));
  typedef int32_t mask __attribute__((vector_size(register_bytes)));
};
template <>
struct Vectors<double> {
  typedef double numbers __attribute__((vector_size(register_bytes)));
  typedef int64_t mask __attribute__((vector_size(register_bytes)));
};

// Which lanes; as the processor has it: a bit a lane, or a lane of ones.
template <class R>
struct Mask {
#if defined(__AVX512F__)
  using Lanes = std::conditional_t<sizeof(R) == 4, __mmask16, __mmask8>;
  MK_FN bool at(int lane) const { return v >> lane & 1; }
#else
  using Lanes = typename Vectors<R>::mask;
  MK_FN bool at(int lane) const { return v[lane] != 0; }
#endif
  Lanes v;
  MK_FN Mask operator!() const { return {Lanes(~v)}; }
  MK_FN Mask operator&(Mask o) const { return {Lanes(v & o.v)}; }
  MK_FN Mask operator|(Mask o) const { return {Lanes(v | o.v)}; }
};

template <class R>
struct Pack {
  static constexpr int lanes = register_bytes / int(sizeof(R));
  using Numbers = typename Vectors<R>::numbers;
  Numbers v;

  Pack() = default;
  MK_FN Pack(Numbers numbers) : v(numbers) {}
  template <class Number>
  MK_FN explicit Pack(Number x) : v(R(x) - Numbers{}) {}  // not 0 + x, which would turn -0 into 0

  MK_FN Pack operator-() const { return Pack(-v); }
  MK_FN friend Pack operator+(Pack a, Pack b) { return Pack(a.v + b.v); }
  MK_FN friend Pack operator-(Pack a, Pack b) { return Pack(a.v - b.v); }
  MK_FN friend Pack operator*(Pack a, Pack b) { return Pack(a.v * b.v); }
  MK_FN friend Pack operator/(Pack a, Pack b) { return Pack(a.v / b.v); }
#if defined(__AVX512F__)
  template <int Relation>
  MK_FN static Mask<R> compare(Pack a, Pack b) {
    if constexpr (sizeof(R) == 4) return {_mm512_cmp_ps_mask(a.v, b.v, Relation)};
    if constexpr (sizeof(R) == 8) return {_mm512_cmp_pd_mask(a.v, b.v, Relation)};
  }
  MK_FN friend Mask<R> operator<(Pack a, Pack b) { return compare<_CMP_LT_OQ>(a, b); }
  MK_FN friend Mask<R> operator>(Pack a, Pack b) { return compare<_CMP_GT_OQ>(a, b); }
  MK_FN friend Mask<R> operator<=(Pack a, Pack b) { return compare<_CMP_LE_OQ>(a, b); }
#else
  MK_FN friend Mask<R> operator<(Pack a, Pack b) { return {a.v < b.v}; }
  MK_FN friend Mask<R> operator>(Pack a, Pack b) { return {a.v > b.v}; }
  MK_FN friend Mask<R> operator<=(Pack a, Pack b) { return {a.v <= b.v}; }
#endif

  MK_FN static Pack load(const R* p) {
    Pack x;
    __builtin_memcpy(&x.v, p, sizeof(x.v));
    return x;
  }
  MK_FN void store(R* p) const { __builtin_memcpy(p, &v, sizeof(v)); }
};

template <class R>
MK_FN Pack<R> fma(Pack<R> a, Pack<R> b, Pack<R> c) {
  [[maybe_unused]] constexpr bool single = sizeof(R) == 4;
#if defined(__AVX512F__)
  if constexpr (single) return Pack<R>(_mm512_fmadd_ps(a.v, b.v, c.v));
  if constexpr (!single) return Pack<R>(_mm512_fmadd_pd(a.v, b.v, c.v));
#elif defined(__AVX2__)
  if constexpr (single) return Pack<R>(_mm256_fmadd_ps(a.v, b.v, c.v));
  if constexpr (!single) return Pack<R>(_mm256_fmadd_pd(a.v, b.v, c.v));
#elif defined(__aarch64__)
  if constexpr (single) return Pack<R>((typename Pack<R>::Numbers)vfmaq_f32(c.v, a.v, b.v));
  if constexpr (!single) return Pack<R>((typename Pack<R>::Numbers)vfmaq_f64(c.v, a.v, b.v));
#else
  return Pack<R>(a.v * b.v + c.v);
#endif
}

template <class R>
MK_FN Pack<R> sqrt(Pack<R> a) {
  [[maybe_unused]] constexpr bool single = sizeof(R) == 4;
#if defined(__AVX512F__)
  // The forms without a mask have, in GCC 12, an operand that it takes for uninitialised.
  if constexpr (single) return Pack<R>(_mm512_maskz_sqrt_ps(0xffff, a.v));
  if constexpr (!single) return Pack<R>(_mm512_maskz_sqrt_pd(0xff, a.v));
#elif defined(__AVX2__)
  if constexpr (single) return Pack<R>(_mm256_sqrt_ps(a.v));
  if constexpr (!single) return Pack<R>(_mm256_sqrt_pd(a.v));
#elif defined(__aarch64__)
  if constexpr (single) return Pack<R>((typename Pack<R>::Numbers)vsqrtq_f32(a.v));
  if constexpr (!single) return Pack<R>((typename Pack<R>::Numbers)vsqrtq_f64(a.v));
#else
  if constexpr (single) return Pack<R>(_mm_sqrt_ps(a.v));
  if constexpr (!single) return Pack<R>(_mm_sqrt_pd(a.v));
#endif
}

// Of floats from an estimate of 14 bits and one step of Newton's, to about a rounding: a root and a division take three
// times as long as all of it.
template <class R>
MK_FN Pack<R> rsqrt(Pack<R> a) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) {
    const Pack<R> y(_mm512_maskz_rsqrt14_ps(0xffff, a.v));
    return fma(fma(-(a * y), y, Pack<R>(1)), Pack<R>(R(0.5)) * y, y);
  }
#endif
  return Pack<R>(R(1)) / sqrt(a);
}

template <class R>
MK_FN Pack<R> root(Pack<R> a) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4)  // not of less than the least normal number, whose estimate would be infinite
    return a * rsqrt(Pack<R>(_mm512_maskz_max_ps(0xffff, _mm512_set1_ps(1.17549435e-38f), a.v)));
#endif
  return sqrt(a);
}
template <class R>
MK_FN Pack<R> reciprocal(Pack<R> a) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) {
    const Pack<R> y(_mm512_maskz_rcp14_ps(0xffff, a.v));
    return fma(fma(-a, y, Pack<R>(1)), y, y);
  }
#endif
  return Pack<R>(R(1)) / a;
}

template <class R>
MK_FN Pack<R> select(Mask<R> mask, Pack<R> a, Pack<R> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) return Pack<R>(_mm512_mask_blend_ps(mask.v, b.v, a.v));
  if constexpr (sizeof(R) == 8) return Pack<R>(_mm512_mask_blend_pd(mask.v, b.v, a.v));
#else
  return Pack<R>(mask.v ? a.v : b.v);
#endif
}

template <class R>
MK_FN Pack<R> abs(Pack<R> a) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) return Pack<R>(_mm512_abs_ps(a.v));
  if constexpr (sizeof(R) == 8) return Pack<R>(_mm512_abs_pd(a.v));
#else
  return select(a < Pack<R>(R(0)), -a, a);
#endif
}

// b where it is above (below) a, else a: a NaN in b is left out, one in a stays.
template <class R>
MK_FN Pack<R> max(Pack<R> a, Pack<R> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) return Pack<R>(_mm512_maskz_max_ps(0xffff, b.v, a.v));
  if constexpr (sizeof(R) == 8) return Pack<R>(_mm512_maskz_max_pd(0xff, b.v, a.v));
#else
  return select(a < b, b, a);
#endif
}
template <class R>
MK_FN Pack<R> min(Pack<R> a, Pack<R> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) return Pack<R>(_mm512_maskz_min_ps(0xffff, b.v, a.v));
  if constexpr (sizeof(R) == 8) return Pack<R>(_mm512_maskz_min_pd(0xff, b.v, a.v));
#else
  return select(b < a, b, a);
#endif
}

template <class R>
MK_FN bool any(Mask<R> mask) {
#if defined(__AVX512F__)
  return mask.v != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask.v) != 0;
#else
  bool found = false;
  for (int l = 0; l < Pack<R>::lanes; l++) found |= mask.v[l] != 0;
  return found;
#endif
}

// Doubles, and floats of many turns, one by one: float64 is for checking.
template <class R>
__attribute__((noinline)) void sine_cosine_by_libm(Pack<R> x, Mask<R> which, SineCosine<Pack<R>>* at) {
  for (int l = 0; l < Pack<R>::lanes; l++) {
    if (!which.at(l)) continue;
    const SineCosine<R> one = mk::sine_cosine(R(x.v[l]));
    at->sine.v[l] = one.sine;
    at->cosine.v[l] = one.cosine;
  }
}
template <class R>
MK_FN SineCosine<Pack<R>> sine_cosine(Pack<R> x) {
  if constexpr (sizeof(R) == 4) {
    SineCosine<Pack<R>> at = sine_cosine_of_floats(x);
    const auto far = !(abs(x) <= Pack<R>(longest_float_angle));
    if (any(far)) sine_cosine_by_libm(x, far, &at);
    return at;
  } else {
    SineCosine<Pack<R>> at;
    sine_cosine_by_libm(x, !(x < x), &at);
    return at;
  }
}

// Halves of a register of floats as doubles.
typedef float HalfFloats __attribute__((vector_size(register_bytes / 2)));
MK_FN Pack<double> lower(Pack<float> a) {
  HalfFloats half;
  __builtin_memcpy(&half, &a.v, sizeof(half));
  return Pack<double>(__builtin_convertvector(half, Pack<double>::Numbers));
}
MK_FN Pack<double> upper(Pack<float> a) {
  HalfFloats half;
  __builtin_memcpy(&half, reinterpret_cast<const char*>(&a.v) + sizeof(half), sizeof(half));
  return Pack<double>(__builtin_convertvector(half, Pack<double>::Numbers));
}

// The sum over lanes in a fixed order.
template <class R>
MK_FN double total(Pack<R> a) {
  double sum = 0;
  for (int l = 0; l < Pack<R>::lanes; l++) sum += double(a.v[l]);
  return sum;
}

}  // namespace MK_ISA

template <class R>
struct RealOf<MK_ISA::Pack<R>> {
  using type = R;
};

}  // namespace mk
