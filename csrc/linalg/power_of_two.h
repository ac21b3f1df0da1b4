// Scaling that rounds nothing: by powers of two.
#pragma once

#include <cstdint>

#include "lane.h"

namespace mk {

// |x| without its mantissa: 2^floor(log2 |x|), 0 for denormal numbers, Inf for Inf and NaN.
MK_FN float without_mantissa(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  bits &= 0x7f800000;
  __builtin_memcpy(&x, &bits, sizeof(bits));
  return x;
}
MK_FN double without_mantissa(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  bits &= 0x7ff0000000000000;
  __builtin_memcpy(&x, &bits, sizeof(bits));
  return x;
}

template <class R>
struct Range;
template <>
struct Range<float> {
  static constexpr float smallest = 0x1p-126f, inverse = 0x1p126f;
};
template <>
struct Range<double> {
  static constexpr double smallest = 0x1p-1022, inverse = 0x1p1022;
};

// A power of two, itself and its inverse normal numbers, that x divided by comes near to one: |x| into [1, 4), denormal
// numbers as near as it can.
template <class T>
MK_FN T magnitude(T x) {
  using R = Real<T>;
  return min(max(without_mantissa(x), T(Range<R>::smallest)), T(Range<R>::inverse));
}

}  // namespace mk
