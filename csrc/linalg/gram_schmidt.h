// Orthogonal columns of one length by Gram and Schmidt, for columns that are far from dependent: a fraction of the work
// of rotations.
#pragma once

#include "lane.h"
#include "size.h"

namespace mk {

// Y becomes `length` times Q (n x p) of its thin QR decomposition, diagonal of R >= 0. Returns the mask of the matrices
// for which that is good to a few roundings: those whose columns, of about this length or a little more, keep at least
// 1/4 of its square when the earlier ones are taken out. The columns are scaled at the end, so that a product does not
// wait for a root. The last column of a 3 x 3 matrix is the cross product of the others, on the side of `last`, which
// may be Y's own.
template <class T, class Size>
MK_FN auto gram_schmidt(T* Y, T length, const T* last, Size size) {
  const int n = size.n, p = size.p;
  constexpr bool crosses = Size::capacity == 9 && Size::square_capacity == 9;
  const int columns = crosses ? 2 : p;
  const T unit = length * length, least = T(0.25) * unit, most = T(16) * unit;
  T inverse[Size::square_capacity];
  auto good = T(0) < unit;
  MK_UNROLL
  for (int j = 0; j < columns; j++) {
    MK_UNROLL
    for (int k = 0; k < j; k++) {
      T along = Y[k] * Y[j];
      MK_UNROLL
      for (int i = 1; i < n; i++) along = fma(Y[i * p + k], Y[i * p + j], along);
      along = along * (inverse[k] * inverse[k]);
      MK_UNROLL
      for (int i = 0; i < n; i++) Y[i * p + j] = fma(-along, Y[i * p + k], Y[i * p + j]);
    }
    T square = Y[j] * Y[j];
    MK_UNROLL
    for (int i = 1; i < n; i++) square = fma(Y[i * p + j], Y[i * p + j], square);
    good = good & (least <= square) & (square <= most);
    inverse[j] = rsqrt(square);
  }
  if constexpr (crosses) {
    T z[3];
    MK_UNROLL
    for (int i = 0; i < 3; i++) {
      const int j = (i + 1) % 3, k = (i + 2) % 3;
      z[i] = fma(Y[3 * j], Y[3 * k + 1], -(Y[3 * k] * Y[3 * j + 1]));
    }
    const T side = fma(z[0], last[0], fma(z[1], last[3], z[2] * last[6]));
    const T factor = (length * inverse[0]) * inverse[1];
    const T signed_factor = select(side < T(0), -factor, factor);
    MK_UNROLL
    for (int i = 0; i < 3; i++) Y[3 * i + 2] = z[i] * signed_factor;
  }
  MK_UNROLL
  for (int j = 0; j < columns; j++) {
    const T factor = length * inverse[j];
    MK_UNROLL
    for (int i = 0; i < n; i++) Y[i * p + j] = Y[i * p + j] * factor;
  }
  return good;
}

}  // namespace mk
