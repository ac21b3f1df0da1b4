// Rotations made of a skew matrix A (p x p): its exponential and its Cayley transform. A is given whole; what is
// symmetric in it to rounding is not looked at where p = 3.
#pragma once

#include "linalg/givens.h"
#include "linalg/sine.h"
#include "linalg/small_matrix.h"

namespace mk {

// E = I + a A + b A^2 for A (3 x 3), in terms of the axis: A x = v cross x, A^2 = v v^T - ||v||^2 I.
template <class T>
MK_FN void rotation_of_axis(const T* A, T a, T b, T* E) {
  const T x = A[7], y = A[2], z = A[3];
  const T bx = b * x, by = b * y, xy = bx * y, xz = bx * z, yz = by * z, xx = bx * x, yy = by * y, zz = b * z * z;
  E[0] = T(1) - (yy + zz);
  E[4] = T(1) - (xx + zz);
  E[8] = T(1) - (xx + yy);
  E[1] = fma(-a, z, xy);
  E[3] = fma(a, z, xy);
  E[6] = fma(-a, y, xz);
  E[2] = fma(a, y, xz);
  E[5] = fma(-a, x, yz);
  E[7] = fma(a, x, yz);
}

template <class T>
MK_FN T square_of_axis(const T* A) {
  return fma(A[7], A[7], fma(A[2], A[2], A[3] * A[3]));
}

// C = A B for A, B (p x p) whose product is symmetric.
template <class T>
MK_FN void multiply_symmetric(const T* A, const T* B, T* C, int p) {
  MK_UNROLL
  for (int i = 0; i < p; i++) {
    MK_UNROLL
    for (int j = i; j < p; j++) {
      T sum = A[i * p] * B[j];
      MK_UNROLL
      for (int l = 1; l < p; l++) sum = fma(A[i * p + l], B[l * p + j], sum);
      C[i * p + j] = C[j * p + i] = sum;
    }
  }
}

// P = sum over k of X^k / (2 k + offset)!, k <= 2 m, for a symmetric X (p x p); X2 = X^2.
template <class T, class Size>
MK_FN void even_series(const T* X, const T* X2, int m, int offset, T* P, Size size) {
  using R = Real<T>;
  const int p = size.p;
  R term[9], factorial = R(1);
  for (int k = 0, n = 0; k <= 2 * m; k++) {
    for (; n < 2 * k + offset; n++) factorial *= R(n + 1);
    term[k] = R(1) / factorial;
  }
  T work[Size::square_capacity];
  MK_UNROLL
  for (int e = 0; e < p * p; e++)
    P[e] = fma(X2[e], T(term[2 * m]), fma(X[e], T(term[2 * m - 1]), T(e % (p + 1) == 0 ? term[2 * m - 2] : R(0))));
  MK_UNROLL
  for (int k = m - 2; k >= 0; k--) {
    multiply_symmetric(X2, P, work, p);
    MK_UNROLL
    for (int e = 0; e < p * p; e++)
      P[e] = fma(X[e], T(term[2 * k + 1]), work[e] + T(e % (p + 1) == 0 ? term[2 * k] : R(0)));
  }
}

// E = exp(A): by Rodrigues' formula where p = 3, else by scaling and squaring of exp(A) = cos(iA) + A sinc(iA), series
// in the symmetric A^2, whose products cost half.
//
// A is halved until ||A||_F^2 <= 1/2, where no eigenvalue is above 1/2 (they come in pairs +-i t). The series to A^9
// (float) and A^17 (double) leave out (1/2)^10/10! = 3e-10 and (1/2)^18/18! = 6e-22, with room for squarings. Every
// lane has a number of halvings of its own, none where it is not finite.
template <class T, class Size>
MK_FN void exp_skew(const T* A, T* E, Size size) {
  using R = Real<T>;
  const int p = size.p;
  if (p == 3) {
    const T square = square_of_axis(A), half = T(0.5) * sqrt(square);
    const SineCosine<T> at_half = sine_cosine(half);
    const auto moves = half > T(0);
    const T sinc = select(moves, at_half.sine / select(moves, half, T(1)), T(1));
    // sin(t)/t and (1 - cos(t))/t^2 without cancellation
    return rotation_of_axis(A, sinc * at_half.cosine, T(0.5) * sinc * sinc, E);
  }
  const T square = square_norm(A, p * p);
  int halvings = 0;
  T factor = T(1), own = T(0);  // 2^-own
  const T finite_square = select(square <= T(Limits<R>::largest), square, T(0));
  for (auto longer = finite_square > T(0.5); any(longer); longer = finite_square * factor * factor > T(0.5)) {
    factor = select(longer, factor * T(0.5), factor);
    own = select(longer, own + T(1), own);
    halvings++;
  }
  T B[Size::square_capacity], X[Size::square_capacity], X2[Size::square_capacity], S[Size::square_capacity];
  MK_UNROLL
  for (int e = 0; e < p * p; e++) B[e] = A[e] * factor;
  multiply_symmetric(B, B, X, p);
  multiply_symmetric(X, X, X2, p);
  const int m = sizeof(R) == sizeof(float) ? 2 : 4;
  even_series(X, X2, m, 1, S, size);
  multiply(B, S, E, p, p, p);
  even_series(X, X2, m, 0, S, size);
  MK_UNROLL
  for (int e = 0; e < p * p; e++) E[e] = E[e] + S[e];
  for (int k = 0; k < halvings; k++) {
    multiply(E, E, X, p, p, p);
    MK_UNROLL
    for (int e = 0; e < p * p; e++) E[e] = select(T(R(k)) < own, X[e], E[e]);
  }
}

// E = (I - A/2)^{-1} (I + A/2)
template <class T, class Size>
MK_FN void cayley_skew(const T* A, T* E, Size size) {
  const int p = size.p;
  if (p == 3) {
    const T inverse = T(1) / fma(T(0.25), square_of_axis(A), T(1));
    return rotation_of_axis(A, inverse, T(0.5) * inverse, E);
  }
  T K[Size::square_capacity];
  MK_UNROLL
  for (int e = 0; e < p * p; e++) {
    const T one = T(e % (p + 1) == 0 ? 1 : 0);
    K[e] = fma(T(-0.5), A[e], one);
    E[e] = fma(T(0.5), A[e], one);
  }
  givens_solve(K, E, p, p);
}

}  // namespace mk
