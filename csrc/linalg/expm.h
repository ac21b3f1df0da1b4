// The matrix exponential by scaling and squaring of a Taylor polynomial.
#pragma once

#include "linalg/small_matrix.h"

namespace mk {

// E = exp(A) for A (m x m); A is overwritten. work: 2 m m elements.
//
// A is halved k times until its 1-norm is at most 1/2. The Taylor remainder after degree d is below (1/2)^{d+1}/(d+1)!,
// 2e-10 for d = 8 and 1e-19 for d = 14, under the rounding of float and of double with room for k squarings.
// All lanes take the number of halvings of the largest.
template <class T>
MK_FN void expm(T* A, T* E, T* work, int m) {
  using R = Real<T>;
  T norm = T(0);
  for (int j = 0; j < m; j++) {
    T column = T(0);
    for (int i = 0; i < m; i++) column = column + abs(A[i * m + j]);
    norm = max(norm, column);
  }
  int halvings = 0;
  for (T rest = norm; any(rest > T(0.5)); rest = rest * T(0.5)) halvings++;
  T factor = T(1);
  for (int k = 0; k < halvings; k++) factor = factor * T(0.5);
  for (int e = 0; e < m * m; e++) A[e] = A[e] * factor;

  const int degree = sizeof(R) == sizeof(float) ? 8 : 14;
  T* product = work;
  // Horner: E <- I + A E / k
  for (int e = 0; e < m * m; e++) E[e] = T(e % (m + 1) == 0 ? 1 : 0);
  for (int k = degree; k >= 1; k--) {
    multiply(A, E, product, m, m, m);
    for (int e = 0; e < m * m; e++) E[e] = fma(product[e], T(R(1) / R(k)), T(e % (m + 1) == 0 ? 1 : 0));
  }
  for (int k = 0; k < halvings; k++) {
    multiply(E, E, product, m, m, m);
    for (int e = 0; e < m * m; e++) E[e] = product[e];
  }
}

}  // namespace mk
