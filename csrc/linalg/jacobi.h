// The polar factor by one-sided Jacobi rotations (Hestenes): columns are rotated in pairs until they are orthogonal.
#pragma once

#include "linalg/small_matrix.h"
#include "size.h"

namespace mk {

// Where element (i, j) of an n x p matrix stands.
struct RowMajor {
  MK_FN static int at(int i, int j, int, int p) { return i * p + j; }
};
struct ColumnMajor {
  MK_FN static int at(int i, int j, int n, int) { return j * n + i; }
};

// Columns whose square is below are nothing beside a matrix of size one, and are not turned by themselves: zeta could
// not be squared.
template <class R>
constexpr R negligible_square = Limits<R>::epsilon * Limits<R>::epsilon * Limits<R>::epsilon;

// The rotation that makes two columns orthogonal, from their squares and their product; the identity where they are so
// already (`still`). Accurate to rounding relative to both columns, so that a long one does not spoil a short one.
template <class T>
struct ColumnRotation {
  using Mask = decltype(T() < T());
  Mask still;
  T c, s;
  MK_FN ColumnRotation(T aa, T bb, T ab) {
    using R = Real<T>;
    const T size_ab = sqrt(max(aa, T(negligible_square<R>))) * sqrt(max(bb, T(negligible_square<R>)));
    still = !(abs(ab) > T(R(4) * Limits<R>::epsilon) * size_ab);
    // tan of the angle: the smaller root of t^2 + 2 zeta t - 1 = 0
    const T zeta = (bb - aa) / (T(2) * select(still, T(1), ab));
    const T root = T(1) / (abs(zeta) + sqrt(fma(zeta, zeta, T(1))));
    const T t = select(still, T(0), select(zeta < T(0), -root, root));
    c = rsqrt(fma(t, t, T(1)));
    s = c * t;
  }
  MK_FN void apply(T& a, T& b) const {
    const T x = a, y = b;
    a = fma(c, x, -(s * y));
    b = fma(s, x, c * y);
  }
};

// Convergence is quadratic; so many sweeps are never reached by finite input.
constexpr int most_sweeps = 30;

// Rotates the columns of Y (n x p) until they are orthogonal: Y <- Y V, where V (p x p) is the product of the
// rotations.
template <class Order, class T, class Size>
MK_FN void jacobi_rotate(T* Y, T* V, Size size) {
  const int n = size.n, p = size.p;
  MK_UNROLL
  for (int i = 0; i < p; i++) {
    MK_UNROLL
    for (int j = 0; j < p; j++) V[Order::at(i, j, p, p)] = T(i == j ? 1 : 0);
  }
  for (int sweep = 0; sweep < most_sweeps; sweep++) {
    T worst = T(0);
    MK_UNROLL
    for (int a = 0; a + 1 < p; a++) {
      MK_UNROLL
      for (int b = a + 1; b < p; b++) {
        T aa = T(0), bb = T(0), ab = T(0);
        MK_UNROLL
        for (int i = 0; i < n; i++) {
          aa = fma(Y[Order::at(i, a, n, p)], Y[Order::at(i, a, n, p)], aa);
          bb = fma(Y[Order::at(i, b, n, p)], Y[Order::at(i, b, n, p)], bb);
          ab = fma(Y[Order::at(i, a, n, p)], Y[Order::at(i, b, n, p)], ab);
        }
        const ColumnRotation<T> rotation(aa, bb, ab);
        worst = max(worst, select(rotation.still, T(0), T(1)));
        MK_UNROLL
        for (int i = 0; i < n; i++) rotation.apply(Y[Order::at(i, a, n, p)], Y[Order::at(i, b, n, p)]);
        MK_UNROLL
        for (int i = 0; i < p; i++) rotation.apply(V[Order::at(i, a, p, p)], V[Order::at(i, b, p, p)]);
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
  jacobi_rotate<RowMajor>(Y, V, size);
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
