// sin and cos of one angle a lane, together.
#pragma once

#include "lane.h"

namespace mk {

template <class T>
struct SineCosine {
  T sine, cosine;
};

// By libm, for scalars; cpu/pack.h has the same for registers.
MK_FN SineCosine<float> sine_cosine(float x) { return {__builtin_sinf(x), __builtin_cosf(x)}; }
MK_FN SineCosine<double> sine_cosine(double x) { return {__builtin_sin(x), __builtin_cos(x)}; }
MK_FN SineCosine<long double> sine_cosine(long double x) { return {__builtin_sinl(x), __builtin_cosl(x)}; }

constexpr float longest_float_angle = 256;

// For lanes of floats, |x| <= longest_float_angle; within 2 units in the last place.
//
// x is reduced by the nearest multiple k of pi/2, in four parts of 12, 12, 12 and 24 bits: k has 8 bits, so that the
// first three products are exact with and without a fused multiply-add, and so are the first two differences. On
// [-pi/4, pi/4] minimax polynomials, r + r^3 S(r^2) and 1 - r^2/2 + r^4 C(r^2), that err by 0.06 and 0.002 of 2^-24.
template <class T>
MK_FN SineCosine<T> sine_cosine_of_floats(T x) {
  const T to_integer = T(0x1.8p23f);  // adding it leaves no bit behind the point
  const T k = (x * T(0x1.45f306p-1f) + to_integer) - to_integer;
  T r = fma(-k, T(0x1.92p0f), x);
  r = fma(-k, T(0x1.fb4p-12f), r);
  r = fma(-k, T(0x1.444p-24f), r);
  r = fma(-k, T(0x1.68c234p-39f), r);
  const T z = r * r;
  const T s = fma(r * z, fma(fma(T(-0x1.9943b4p-13f), z, T(0x1.11073ap-7f)), z, T(-0x1.555546p-3f)), r);
  const T c =
      fma(z * z, fma(fma(T(0x1.99eb74p-16f), z, T(-0x1.6c0c34p-10f)), z, T(0x1.55554ap-5f)), fma(T(-0.5f), z, T(1)));
  // The quadrant, k modulo 4, in -2 … 2.
  const T quadrant = k - ((k * T(0.25f) + to_integer) - to_integer) * T(4);
  const T square = quadrant * quadrant;
  const auto odd = (square > T(0.5f)) & (square < T(1.5f));
  const T sine = select(odd, c, s), cosine = select(odd, s, c);
  const auto sine_below = (quadrant < T(-0.5f)), sine_turned = quadrant > T(1.5f);
  const auto cosine_below = (quadrant > T(0.5f)), cosine_turned = quadrant < T(-1.5f);
  return {select(sine_below, -sine, select(sine_turned, -sine, sine)),
          select(cosine_below, -cosine, select(cosine_turned, -cosine, cosine))};
}

}  // namespace mk
