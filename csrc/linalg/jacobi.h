// The polar factor by one-sided Jacobi rotations (Hestenes): columns are rotated in pairs until they are orthogonal.
#pragma once

#include "linalg/small_matrix.h"
#include "size.h"

namespace mk {

// Rotates the columns of Y (n x p) until they are orthogonal: Y <- Y V, where V (p x p) is the product of the
// rotations.
//
// Every pair's rotation is accurate to rounding relative to its own columns, so that a long column does not spoil a
// short one, unless it is below `negligible_square`, which is nothing beside a matrix of size one: the tangent of its
// rotation could not be squared.
template <class R>
constexpr R negligible_square = Limits<R>::epsilon * Limits<R>::epsilon * Limits<R>::epsilon;

template <class T, class Size>
MK_FN void jacobi_rotate(T* Y, T* V, Size size) {
  using R = Real<T>;
  const int n = size.n, p = size.p;
  for (int i = 0; i < p; i++)
    for (int j = 0; j < p; j++) V[i * p + j] = T(i == j ? 1 : 0);
  // Convergence is quadratic; 30 sweeps are never reached by finite input.
  for (int sweep = 0; sweep < 30; sweep++) {
    T worst = T(0);
    for (int a = 0; a + 1 < p; a++) {
      for (int b = a + 1; b < p; b++) {
        T aa = T(0), bb = T(0), ab = T(0);
        for (int i = 0; i < n; i++) {
          aa = fma(Y[i * p + a], Y[i * p + a], aa);
          bb = fma(Y[i * p + b], Y[i * p + b], bb);
          ab = fma(Y[i * p + a], Y[i * p + b], ab);
        }
        const T size_ab = sqrt(max(aa, T(negligible_square<R>))) * sqrt(max(bb, T(negligible_square<R>)));
        const auto still = !(abs(ab) > T(R(4) * Limits<R>::epsilon) * size_ab);
        worst = max(worst, select(still, T(0), T(1)));
        // tan of the angle: the smaller root of t^2 + 2 zeta t - 1 = 0
        const T zeta = (bb - aa) / (T(2) * select(still, T(1), ab));
        const T root = T(1) / (abs(zeta) + sqrt(fma(zeta, zeta, T(1))));
        const T t = select(still, T(0), select(zeta < T(0), -root, root));
        const T c = rsqrt(fma(t, t, T(1)));
        const T s = c * t;
        for (int i = 0; i < n; i++) {
          const T x = Y[i * p + a], y = Y[i * p + b];
          Y[i * p + a] = fma(c, x, -(s * y));
          Y[i * p + b] = fma(s, x, c * y);
        }
        for (int i = 0; i < p; i++) {
          const T x = V[i * p + a], y = V[i * p + b];
          V[i * p + a] = fma(c, x, -(s * y));
          V[i * p + b] = fma(s, x, c * y);
        }
      }
    }
    if (!any(worst > T(0))) break;
  }
}

// U = Y (Y^T Y)^{-1/2} for Y (n x p, n >= p) of full rank. Y is overwritten.
//
// With Y V = U S (S diagonal, V the rotations), the polar factor is U V^T.
template <class T, class Size>
MK_FN void jacobi_polar(T* Y, T* U, Size size) {
  using R = Real<T>;
  const int n = size.n, p = size.p;
  T V[Size::square_capacity];
  jacobi_rotate(Y, V, size);
  for (int j = 0; j < p; j++) {
    T square = T(0);
    for (int i = 0; i < n; i++) square = fma(Y[i * p + j], Y[i * p + j], square);
    const T inverse = rsqrt(max(square, T(Limits<R>::tiny_square)));
    for (int i = 0; i < n; i++) Y[i * p + j] = Y[i * p + j] * inverse;
  }
  for (int i = 0; i < n; i++) {
    for (int j = 0; j < p; j++) {
      T sum = T(0);
      for (int k = 0; k < p; k++) sum = fma(Y[i * p + k], V[j * p + k], sum);
      U[i * p + j] = sum;
    }
  }
}

}  // namespace mk
