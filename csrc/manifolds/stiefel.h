// Orthonormal columns, Q^T Q = I for Q (n x p), n >= p. Scale is the caller's (Q = W/s, V/s).
#pragma once

#include "linalg/expm.h"
#include "linalg/givens.h"
#include "linalg/polar.h"
#include "linalg/skew.h"
#include "linalg/small_matrix.h"

namespace mk::stiefel {

// xi = M - Q sym(Q^T M); returns ||xi||^2.
template <class T, class Size>
MK_FN T project(const T* Q, const T* M, T* xi, Size size) {
  const int n = size.n, p = size.p;
  T A[Size::square_capacity];
  multiply_tn(Q, M, A, n, p, p);
  MK_UNROLL
  for (int i = 0; i < p; i++) {
    MK_UNROLL
    for (int j = i; j < p; j++) A[i * p + j] = A[j * p + i] = T(0.5) * (A[i * p + j] + A[j * p + i]);
  }
  MK_UNROLL
  for (int i = 0; i < n; i++) {
    MK_UNROLL
    for (int j = 0; j < p; j++) {
      T x = M[i * p + j];
      MK_UNROLL
      for (int k = 0; k < p; k++) x = fma(-Q[i * p + k], A[k * p + j], x);
      xi[i * p + j] = x;
    }
  }
  return square_norm(xi, n * p);
}

// Q <- qf(Q + step xi)
template <class T, class Size>
MK_FN void retract_qr(T* Q, const T* xi, T step, Size size) {
  T Y[Size::capacity];
  MK_UNROLL
  for (int e = 0; e < size.n * size.p; e++) Y[e] = fma(step, xi[e], Q[e]);
  givens_qf(Y, Q, size);
}

// Q <- Y (Y^T Y)^{-1/2}, Y = Q + step xi; square = ||xi||^2.
//
// The singular values of Y lie between 1 and sqrt(1 + k), k = ||step xi||^2: divided by the root of 1 + k/2, their
// squares lie about 1 (at most k/(k + 2) away), where the iteration for the polar factor converges fastest.
template <class T, class Size>
MK_FN void retract_polar(T* Q, const T* xi, T step, T square, Size size) {
  T Y[Size::capacity];
  const T shrink = rsqrt(fma(T(0.5) * step * step, square, T(1))), length = shrink * step;
  MK_UNROLL
  for (int e = 0; e < size.n * size.p; e++) Y[e] = fma(length, xi[e], shrink * Q[e]);
  nearest_orthonormal(Y, Q, size);
}

// Cayley and exp turn Q by an orthogonal factor. They solve or square their way along the whole arc, and lose it in
// rounding where it is very long: at ||V|| = 64, ten turns, they stop. Both end on the nearest orthonormal matrix, or
// the rounding errors of all steps would add up.
template <class T>
MK_FN T cut(T step, T square) {
  const T longest = T(64);
  const auto longer = step * step * square > longest * longest;
  return any(longer) ? select(longer, step * (longest / (abs(step) * sqrt(square))), step) : step;
}

// A = the skew part of step Q^T xi (p x p), all of it for a tangent xi but for rounding, which is a large part where Q
// was stored in 16 bits.
template <class T, class Size>
MK_FN void turn_of(const T* Q, const T* xi, T step, T* A, Size size) {
  const int n = size.n, p = size.p;
  const T half = T(0.5) * step;
  MK_UNROLL
  for (int i = 0; i < p; i++) {
    A[i * p + i] = T(0);
    MK_UNROLL
    for (int j = i + 1; j < p; j++) {
      T above = Q[i] * xi[j], below = Q[j] * xi[i];
      MK_UNROLL
      for (int k = 1; k < n; k++) {
        above = fma(Q[k * p + i], xi[k * p + j], above);
        below = fma(Q[k * p + j], xi[k * p + i], below);
      }
      A[i * p + j] = half * (above - below);
      A[j * p + i] = -A[i * p + j];
    }
  }
}

// Square matrices: all that a tangent vector does is to turn, xi = Q A, and the p x p rotation of A takes the place of
// the formulas below.
template <bool Exp, class T, class Size>
MK_FN void retract_square(T* Q, const T* xi, T step, Size size) {
  T A[Size::square_capacity], E[Size::square_capacity], Y[Size::capacity];
  turn_of(Q, xi, step, A, size);
  if constexpr (Exp) exp_skew(A, E, size);
  if constexpr (!Exp) cayley_skew(A, E, size);
  multiply(Q, E, Y, size.p, size.p, size.p);
  nearest_orthonormal(Y, Q, size);
}

// Q <- Q + U (I - Z^T U / 2)^{-1} Z^T Q with P = I - Q Q^T / 2, U = [P X, Q], Z = [Q, -P X] (n x 2p), X = step xi.
template <class T, class Size>
MK_FN void retract_cayley(T* Q, const T* xi, T step, Size size) {
  if (size.n == size.p) return retract_square<false>(Q, xi, step, size);
  const int n = size.n, p = size.p, m = 2 * p;
  T X[Size::capacity], A[Size::square_capacity], PX[Size::capacity];
  for (int e = 0; e < n * p; e++) X[e] = step * xi[e];
  multiply_tn(Q, X, A, n, p, p);
  multiply(Q, A, PX, n, p, p);
  for (int e = 0; e < n * p; e++) PX[e] = fma(T(-0.5), PX[e], X[e]);
  T U[Size::tall_capacity], Z[Size::tall_capacity];
  for (int i = 0; i < n; i++) {
    for (int j = 0; j < p; j++) {
      U[i * m + j] = PX[i * p + j];
      U[i * m + p + j] = Q[i * p + j];
      Z[i * m + j] = Q[i * p + j];
      Z[i * m + p + j] = -PX[i * p + j];
    }
  }
  T K[Size::double_capacity], B[Size::double_capacity];
  multiply_tn(Z, U, K, n, m, m);
  for (int i = 0; i < m; i++)
    for (int j = 0; j < m; j++) K[i * m + j] = fma(T(-0.5), K[i * m + j], T(i == j ? 1 : 0));
  multiply_tn(Z, Q, B, n, m, p);
  givens_solve(K, B, m, p);
  multiply(U, B, PX, n, m, p);
  for (int e = 0; e < n * p; e++) PX[e] = Q[e] + PX[e];
  nearest_orthonormal(PX, Q, size);
}

// Q <- [Q X] expm([[A, -X^T X], [I, A]]) [I; 0] expm(-A), A = Q^T X, X = step xi (Edelman, Arias & Smith 1998,
// section 2.2.2, Euclidean metric).
template <class T, class Size>
MK_FN void retract_exp(T* Q, const T* xi, T step, Size size) {
  if (size.n == size.p) return retract_square<true>(Q, xi, step, size);
  const int n = size.n, p = size.p, m = 2 * p;
  T X[Size::capacity], A[Size::square_capacity], S[Size::square_capacity];
  // Projected once more: the exponential grows with what is symmetric in A, which is not only rounding where Q was
  // stored in 16 bits.
  project(Q, xi, X, size);
  turn_of(Q, X, step, A, size);
  for (int e = 0; e < n * p; e++) X[e] = step * X[e];
  multiply_tn(X, X, S, n, p, p);
  T block[Size::double_capacity], E[Size::double_capacity], work[Size::double_capacity];
  for (int i = 0; i < p; i++) {
    for (int j = 0; j < p; j++) {
      block[i * m + j] = block[(p + i) * m + p + j] = A[i * p + j];
      block[i * m + p + j] = -S[i * p + j];
      block[(p + i) * m + j] = T(i == j ? 1 : 0);
    }
  }
  expm(block, E, work, m);
  T F[Size::square_capacity];
  for (int e = 0; e < p * p; e++) S[e] = -A[e];
  expm(S, F, work, p);
  T Y[Size::capacity];
  for (int i = 0; i < n; i++) {
    for (int j = 0; j < p; j++) {
      T sum = T(0);
      for (int k = 0; k < p; k++) sum = fma(Q[i * p + k], E[k * m + j], fma(X[i * p + k], E[(p + k) * m + j], sum));
      Y[i * p + j] = sum;
    }
  }
  multiply(Y, F, X, n, p, p);
  nearest_orthonormal(X, Q, size);
}

}  // namespace mk::stiefel
