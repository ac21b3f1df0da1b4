// Orthonormalisation by Householder reflections, for single matrices of any size, of any rank.
#pragma once

#include "lane.h"

namespace mk {

// Y (n x p, n >= p, rows `stride` apart) <- Q of its thin QR decomposition, diagonal of R >= 0; a column that depends
// on those before it gets some orthonormal completion. `Q` is scratch of the same size, `scale` of p numbers.
template <class T>
void householder_qf(T* Y, T* Q, T* scale, int n, int p, int stride) {
  // Column j becomes v with H_j = I - scale v v^T; q_j is negated where R_jj is negative.
  const auto reflect = [&](int j, T* x, int k) {
    T sum = T(0);
    for (int i = j; i < n; i++) sum += Y[i * stride + j] * x[i * stride + k];
    sum *= scale[j];
    for (int i = j; i < n; i++) x[i * stride + k] -= sum * Y[i * stride + j];
  };
  for (int j = 0; j < p; j++) {
    T square = T(0);
    for (int i = j; i < n; i++) square += Y[i * stride + j] * Y[i * stride + j];
    T& corner = Y[j * stride + j];
    const bool zero = !(square >= T(Limits<T>::tiny_square));
    const T norm = sqrt(square);
    // R_jj is -norm where the corner is positive: v's corner is then a sum without cancellation.
    const bool negative = !zero && corner > T(0);
    Q[j * stride + j] = negative ? T(-1) : T(1);
    corner += negative ? norm : -norm;
    scale[j] = zero ? T(0) : T(1) / (norm * abs(corner));
    for (int k = j + 1; k < p; k++) reflect(j, Y, k);
  }
  for (int i = 0; i < n; i++)
    for (int k = 0; k < p; k++)
      if (i != k) Q[i * stride + k] = T(0);
  for (int j = p - 1; j >= 0; j--)
    for (int k = j; k < p; k++) reflect(j, Q, k);
  for (int i = 0; i < n; i++)
    for (int k = 0; k < p; k++) Y[i * stride + k] = Q[i * stride + k];
}

}  // namespace mk
