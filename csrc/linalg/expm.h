// The matrix exponential by scaling and squaring of a Taylor polynomial.
#pragma once

#include "linalg/small_matrix.h"

namespace mk {

// E = exp(A) for A (m x m); A is overwritten. work: 2 m m elements.
//
// A is halved k times until its 1-norm is at most 1/2. The Taylor remainder after degree d is below (1/2)^{d+1}/(d+1)!,
// 2e-10 for d = 8 and 1e-19 for d = 14, under the rounding of float and of double with room for k squarings.
// Every lane has a number of halvings of its own: squaring a short matrix as often as a long neighbour's would cost it
// a bit of accuracy each time. A lane that is not finite is not halved, and whatever comes out of it.
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
  T factor = T(1), own = T(0);  // 2^-own
  norm = select(norm <= T(Limits<R>::largest), norm, T(0));
  for (auto longer = norm > T(0.5); any(longer); longer = norm * factor > T(0.5)) {
    factor = select(longer, factor * T(0.5), factor);
    own = select(longer, own + T(1), own);
    halvings++;
  }
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
    for (int e = 0; e < m * m; e++) E[e] = select(T(R(k)) < own, product[e], E[e]);
  }
}

}  // namespace mk
