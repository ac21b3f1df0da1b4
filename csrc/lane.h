// What the mathematics may do with a lane type T, here for T = float, double (a CUDA thread, a scalar) and long double.
//
// A lane type holds one number of each of the matrices that are worked on at once. The mathematics headers use only
// + - * /, comparisons (which give a mask) and the functions below; cpu/pack.h gives the same for SIMD registers.
#pragma once

#include <cmath>

// MK_UNROLL: registers cannot be indexed, so nvcc has to unroll every loop over a fixed size. CPU compilers decide for
// themselves (forcing them made the same code, and bloated the loops whose size is not fixed).
// MK_RARE: what is seldom called, kept out of the way of the registers of what is called often.
#ifdef __CUDACC__
#define MK_FN __host__ __device__ __forceinline__
#define MK_RARE __host__ __device__ __noinline__
#define MK_UNROLL _Pragma("unroll")
#else
#define MK_FN inline __attribute__((always_inline))
#define MK_RARE __attribute__((noinline))
#define MK_UNROLL
#endif

namespace mk {

// a * b + c, rounded once where the instruction set has a fused multiply-add (as torch's own kernels are).
MK_FN float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
MK_FN double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__FP_FAST_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}
MK_FN long double fma(long double a, long double b, long double c) { return a * b + c; }

MK_FN float sqrt(float x) { return __builtin_sqrtf(x); }
MK_FN double sqrt(double x) { return __builtin_sqrt(x); }
MK_FN long double sqrt(long double x) { return __builtin_sqrtl(x); }

MK_FN float select(bool mask, float a, float b) { return mask ? a : b; }
MK_FN double select(bool mask, double a, double b) { return mask ? a : b; }
MK_FN long double select(bool mask, long double a, long double b) { return mask ? a : b; }

MK_FN bool any(bool mask) { return mask; }

// The real numbers that a lane type is made of.
template <class T>
struct RealOf {
  using type = T;
};
template <class T>
using Real = typename RealOf<T>::type;

// 2^k as a value of lane type T, for the thresholds that depend on the range of its numbers.
template <class R>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float epsilon = 1.1920929e-7f;
  static constexpr float largest = 3.4028234e38f;
  static constexpr float huge_square = 1e30f;   // sums of squares up to here leave room for a few more products
  static constexpr float tiny_square = 1e-30f;  // below, a vector of the unit-scale problem is zero to rounding
};
template <>
struct Limits<double> {
  static constexpr double epsilon = 2.220446049250313e-16;
  static constexpr double largest = 1.7976931348623157e308;
  static constexpr double huge_square = 1e280;
  static constexpr double tiny_square = 1e-60;
};
template <>
struct Limits<long double> {
  static constexpr long double epsilon = 2.220446049250313e-16L;
  static constexpr long double largest = 1.18973149535723176502e4932L;
  static constexpr long double huge_square = 1e4000L;
  static constexpr long double tiny_square = 1e-60L;
};

template <class T>
MK_FN T abs(T x) {
  return select(x < T(0), -x, x);
}
template <class T>
MK_FN T max(T a, T b) {
  return select(a < b, b, a);
}
template <class T>
MK_FN T min(T a, T b) {
  return select(b < a, b, a);
}
template <class T>
MK_FN T rsqrt(T x) {
  return T(1) / sqrt(x);
}
// A square root and a reciprocal to about two roundings, by the processor's estimates where it has them (cpu/pack.h).
template <class T>
MK_FN T root(T x) {
  return sqrt(x);
}
template <class T>
MK_FN T reciprocal(T x) {
  return T(1) / x;
}
// A GPU's estimate is good to two units in the last place; a Newton step brings it below one. The quotient of a root
// would take five times as many instructions.
MK_FN float rsqrt(float x) {
#ifdef __CUDA_ARCH__
  const float y = ::rsqrtf(x);
  return fma(fma(-x * y, y, 1.0f), 0.5f * y, y);
#else
  return 1.0f / sqrt(x);
#endif
}

}  // namespace mk
