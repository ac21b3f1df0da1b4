// Single numbers as they lie in memory: bfloat16 and float16 are converted on load and store, arithmetic is float.
#pragma once

#include <cstdint>

#include "lane.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace mk {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr float largest_float16 = 65504.0f;

MK_FN uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
MK_FN float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

MK_FN float real(float x) { return x; }
MK_FN double real(double x) { return x; }
MK_FN float real(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
MK_FN float real(Float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  // Scaling by 2^112 moves the exponent's bias and makes half's denormals normal.
  const float magnitude = rest >= 0x7c00 ? float_of(0x7f800000 | (rest << 13)) : float_of(rest << 13) * 0x1p112f;
  return float_of(bits_of(magnitude) | sign);
#endif
}

MK_FN void put(float* p, float x) { *p = x; }
MK_FN void put(double* p, double x) { *p = x; }
MK_FN void put(BFloat16* p, float x) {
  const uint32_t bits = bits_of(x);
  p->bits = x == x ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
}
MK_FN void put(Float16* p, float x) {
#ifdef __CUDA_ARCH__
  p->bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // denormal in half: the sum's last bit is worth 2^-24
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  }
  p->bits = uint16_t(half | ((bits >> 16) & 0x8000));
#endif
}

}  // namespace mk
