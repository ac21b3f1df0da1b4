// Numbers as they lie in memory: bfloat16 and float16 are converted on load and store, arithmetic is float.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/job.h"
#include "cpu/pack.h"
#include "half.h"

namespace mk {
namespace MK_ISA {

using mk::put;
using mk::real;

// The next wider arithmetic type, for what would overflow in this one.
template <class R>
struct StorageTraits;
template <>
struct StorageTraits<float> {
  using Wide = double;
};
template <>
struct StorageTraits<double> {
  using Wide = long double;
};

template <class S>
constexpr Storage storage_of = std::is_same<S, double>::value     ? Storage::float64
                               : std::is_same<S, BFloat16>::value ? Storage::bfloat16
                               : std::is_same<S, Float16>::value  ? Storage::float16
                                                                  : Storage::float32;

// Whole registers, from and to consecutive elements.
MK_FN Pack<float> load(const float* p) { return Pack<float>::load(p); }
MK_FN Pack<double> load(const double* p) { return Pack<double>::load(p); }
MK_FN void store(float* p, Pack<float> x) { x.store(p); }
MK_FN void store(double* p, Pack<double> x) { x.store(p); }

typedef uint32_t Words __attribute__((vector_size(register_bytes)));
typedef uint16_t HalfWords __attribute__((vector_size(register_bytes / 2)));

// GCC 12 takes these apart into smaller registers by itself.
MK_FN Words widened(HalfWords x) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x);
#else
  return __builtin_convertvector(x, Words);
#endif
}
MK_FN HalfWords narrowed(Words x) {
#if defined(__AVX512F__)
  return (HalfWords)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)x);
#else
  return __builtin_convertvector(x, HalfWords);
#endif
}

MK_FN Pack<float> load(const BFloat16* p) {
  HalfWords half;
  __builtin_memcpy(&half, p, sizeof(half));
  return Pack<float>((Pack<float>::Numbers)(widened(half) << 16));
}
// What storing x as S and loading it again gives.
template <class S>
MK_FN Pack<float> as_stored(Pack<float> x);
template <>
MK_FN Pack<float> as_stored<float>(Pack<float> x) {
  return x;
}
template <>
MK_FN Pack<float> as_stored<BFloat16>(Pack<float> x) {
  const Words bits = (Words)x.v;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  const Words nan = Words{} + 0x7fc00000;
  return Pack<float>((Pack<float>::Numbers)(x.v == x.v ? rounded : nan));
}
// Stores a number that S can represent.
MK_FN void store_exact(BFloat16* p, Pack<float> x) {
  const HalfWords half = narrowed((Words)x.v >> 16);
  __builtin_memcpy(p, &half, sizeof(half));
}
MK_FN void store(BFloat16* p, Pack<float> x) { store_exact(p, as_stored<BFloat16>(x)); }

MK_FN Pack<float> load(const Float16* p) {
#if defined(__AVX512F__)
  return Pack<float>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p)));
#elif defined(__F16C__)
  return Pack<float>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
  Pack<float> x;
  for (int l = 0; l < Pack<float>::lanes; l++) x.v[l] = real(p[l]);
  return x;
#endif
}
MK_FN void store(Float16* p, Pack<float> x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, x.v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int l = 0; l < Pack<float>::lanes; l++) put(p + l, x.v[l]);
#endif
}

template <>
MK_FN Pack<float> as_stored<Float16>(Pack<float> x) {
  Float16 memory[Pack<float>::lanes];
  store(memory, x);
  return load(memory);
}
MK_FN void store_exact(Float16* p, Pack<float> x) { store(p, x); }
MK_FN void store_exact(float* p, Pack<float> x) { store(p, x); }
template <class S>
MK_FN Pack<double> as_stored(Pack<double> x) {
  return x;
}
MK_FN void store_exact(double* p, Pack<double> x) { store(p, x); }

// Calls f with a value of the storage type; R, the arithmetic type, narrows the choice.
template <class R, class F>
MK_FN void with_storage(Storage storage, const F& f) {
  if constexpr (sizeof(R) == 8) {
    f(double{});
  } else {
    switch (storage) {
      case Storage::bfloat16:
        return f(BFloat16{});
      case Storage::float16:
        return f(Float16{});
      default:
        return f(float{});
    }
  }
}

// Calls f with a value of the job's arithmetic type.
template <class F>
MK_FN void with_arithmetic(const Job& job, const F& f) {
  if (job.storage == Storage::float64) {
    f(double{});
  } else {
    f(float{});
  }
}

// One element, or the register full of elements from p on, as V says.
template <class V, class S>
MK_FN V get_as(const S* p) {
  if constexpr (std::is_same<V, decltype(real(*p))>::value) {
    return real(*p);
  } else {
    return load(p);
  }
}
template <class S, class R>
MK_FN void put(S* p, Pack<R> x) {
  store(p, x);
}

// The same for storage that only the program knows.
template <class R>
MK_FN Pack<R> as_stored(Storage storage, Pack<R> x) {
  with_storage<R>(storage, [&](auto s) { x = as_stored<decltype(s)>(x); });
  return x;
}
template <class R>
MK_FN R as_stored(Storage storage, R x) {
  with_storage<R>(storage, [&](auto s) {
    put(&s, x);
    x = real(s);
  });
  return x;
}

// One element.
template <class R>
MK_FN R get(Storage storage, const void* base, int64_t offset) {
  R x;
  with_storage<R>(storage, [&](auto s) { x = real(static_cast<const decltype(s)*>(base)[offset]); });
  return x;
}
template <class R>
MK_FN void set(Storage storage, void* base, int64_t offset, R x) {
  with_storage<R>(storage, [&](auto s) { put(static_cast<decltype(s)*>(base) + offset, x); });
}

}  // namespace MK_ISA
}  // namespace mk
