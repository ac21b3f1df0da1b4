// Orthonormalisation by Householder reflections, for single matrices of any size, of any rank.
#pragma once

#include <cstdint>

#include "lane.h"

namespace mk {

// Q of the thin QR decomposition of Y (n x p, n >= p, rows `stride` apart), diagonal of R >= 0; a column that depends
// on those before it gets some orthonormal completion. Y is overwritten; `work` has 2 p numbers.
template <class T>
void householder_qf(T* Y, T* Q, T* work, int n, int p, int64_t stride) {
  T *scale = work, *inner = work + p;
  // x <- H_j x in the columns [first, p), H_j = I - scale v v^T, where v is column j of Y from the diagonal on.
  const auto reflect = [&](int j, T* x, int first) {
    for (int k = first; k < p; k++) inner[k] = T(0);
    for (int i = j; i < n; i++)
      for (int k = first; k < p; k++) inner[k] = fma(Y[i * stride + j], x[i * stride + k], inner[k]);
    for (int i = j; i < n; i++) {
      const T factor = -scale[j] * Y[i * stride + j];
      for (int k = first; k < p; k++) x[i * stride + k] = fma(factor, inner[k], x[i * stride + k]);
    }
  };
  for (int i = 0; i < n; i++)
    for (int k = 0; k < p; k++) Q[i * stride + k] = T(0);
  for (int j = 0; j < p; j++) {
    T square = T(0);
    for (int i = j; i < n; i++) square = fma(Y[i * stride + j], Y[i * stride + j], square);
    T& corner = Y[j * stride + j];
    const bool zero = !(square >= T(Limits<T>::tiny_square));
    const T norm = sqrt(square);
    // v's corner is a sum without cancellation; R_jj is -norm where the corner was positive, and q_j turned round.
    const bool negative = !zero && corner > T(0);
    Q[j * stride + j] = negative ? T(-1) : T(1);
    corner += negative ? norm : -norm;
    scale[j] = zero ? T(0) : T(1) / (norm * abs(corner));
    reflect(j, Y, j + 1);
  }
  for (int j = p - 1; j >= 0; j--) reflect(j, Q, j);
}

}  // namespace mk
