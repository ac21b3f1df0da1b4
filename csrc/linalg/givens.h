// Orthonormalisation and linear systems by Givens rotations: no pivoting, no branch on data, every lane in step.
#pragma once

#include "lane.h"
#include "size.h"

namespace mk {

// The rotation [c s; -s c] that turns (a, b) into (r, 0), r >= 0. Where both are zero to rounding of a problem whose
// columns have norm about one, the identity: dividing by a denormal square would lose orthogonality.
template <class T>
struct Rotation {
  T c, s;
  Rotation() = default;
  MK_FN Rotation(T a, T b) {
    const T square = fma(a, a, b * b);
    const auto zero = square < T(Limits<Real<T>>::tiny_square);
    const T inverse = rsqrt(select(zero, T(1), square));
    c = select(zero, T(1), a * inverse);
    s = select(zero, T(0), b * inverse);
  }
  MK_FN void apply(T& a, T& b) const {
    const T x = a;
    a = fma(c, x, s * b);
    b = fma(c, b, -(s * x));
  }
  MK_FN void apply_transposed(T& a, T& b) const {
    const T x = a;
    a = fma(c, x, -(s * b));
    b = fma(c, b, s * x);
  }
};

// Q (n x p) of the thin QR decomposition of Y (n x p, n >= p), diagonal of R >= 0. Y is overwritten with R.
template <class T, class Size>
MK_FN void givens_qf(T* Y, T* Q, Size size) {
  const int n = size.n, p = size.p;
  Rotation<T> rotation[Size::capacity];
  MK_UNROLL
  for (int j = 0; j < p; j++) {
    MK_UNROLL
    for (int i = n - 1; i > j; i--) {
      rotation[i * p + j] = Rotation<T>(Y[(i - 1) * p + j], Y[i * p + j]);
      MK_UNROLL
      for (int k = j; k < p; k++) rotation[i * p + j].apply(Y[(i - 1) * p + k], Y[i * p + k]);
    }
  }
  MK_UNROLL
  for (int i = 0; i < n; i++) {
    MK_UNROLL
    for (int j = 0; j < p; j++) Q[i * p + j] = T(i == j ? 1 : 0);
  }
  // The last diagonal element of a square R is the only one that no rotation has made >= 0.
  if (n == p) Q[n * p - 1] = select(Y[n * p - 1] < T(0), T(-1), T(1));
  // Counted upwards: for sm_100 nvcc does not unroll five or six rounds that count down, and Q would lie in memory.
  MK_UNROLL
  for (int l = 0; l < p; l++) {
    const int j = p - 1 - l;
    MK_UNROLL
    for (int i = j + 1; i < n; i++) {
      MK_UNROLL
      for (int k = j; k < p; k++) rotation[i * p + j].apply_transposed(Q[(i - 1) * p + k], Q[i * p + k]);
    }
  }
}

// X (m x b) with A X = B for a well-conditioned A (m x m). A and B are overwritten, B with X.
template <class T>
MK_FN void givens_solve(T* A, T* B, int m, int b) {
  MK_UNROLL
  for (int j = 0; j < m; j++) {
    MK_UNROLL
    for (int i = m - 1; i > j; i--) {
      const Rotation<T> rotation(A[(i - 1) * m + j], A[i * m + j]);
      MK_UNROLL
      for (int k = j; k < m; k++) rotation.apply(A[(i - 1) * m + k], A[i * m + k]);
      MK_UNROLL
      for (int k = 0; k < b; k++) rotation.apply(B[(i - 1) * b + k], B[i * b + k]);
    }
  }
  MK_UNROLL
  for (int i = m - 1; i >= 0; i--) {
    const T inverse = T(1) / A[i * m + i];
    MK_UNROLL
    for (int k = 0; k < b; k++) {
      T x = B[i * b + k];
      MK_UNROLL
      for (int l = i + 1; l < m; l++) x = fma(-A[i * m + l], B[l * b + k], x);
      B[i * b + k] = x * inverse;
    }
  }
}

}  // namespace mk
