// The polar factor, the nearest matrix with orthonormal columns: by Newton-Schulz iteration where a matrix is near to
// one, by Jacobi rotations where it is not.
#pragma once

#include "linalg/jacobi.h"
#include "linalg/small_matrix.h"

namespace mk {

// D = I - Z^T Z; returns ||D||_F^2.
template <class T, class Size>
MK_FN T defect(const T* Z, T* D, Size size) {
  const int n = size.n, p = size.p;
  T diagonal = T(0), beside = T(0);
  MK_UNROLL
  for (int i = 0; i < p; i++) {
    MK_UNROLL
    for (int j = i; j < p; j++) {
      T rest = T(i == j ? 1 : 0);
      MK_UNROLL
      for (int k = 0; k < n; k++) rest = fma(-Z[k * p + i], Z[k * p + j], rest);
      D[i * p + j] = D[j * p + i] = rest;
      (i == j ? diagonal : beside) = fma(rest, rest, i == j ? diagonal : beside);
    }
  }
  return fma(T(2), beside, diagonal);
}

// Z <- Z + Z D / 2 in the lanes of `which`.
template <class T, class Which, class Size>
MK_FN void come_nearer(T* Z, const T* D, Which which, Size size) {
  const int n = size.n, p = size.p;
  MK_UNROLL
  for (int i = 0; i < n; i++) {
    T row[Size::square_capacity];
    MK_UNROLL
    for (int j = 0; j < p; j++) {
      T sum = Z[i * p] * D[j];
      MK_UNROLL
      for (int k = 1; k < p; k++) sum = fma(Z[i * p + k], D[k * p + j], sum);
      row[j] = fma(T(0.5), sum, Z[i * p + j]);
    }
    MK_UNROLL
    for (int j = 0; j < p; j++) Z[i * p + j] = select(which, row[j], Z[i * p + j]);
  }
}

// Q <- the polar factor of Y in the lanes of `which`, by rotations, whose rounding errors a last iteration takes away;
// where Y is not finite (steps so long that a double cannot hold their square) Q stays.
template <class T, class Which>
MK_RARE void rotate_to_polar(const T* Y, T* Q, Dynamic size, Which which) {
  const int count = size.n * size.p;
  T from[Dynamic::capacity], U[Dynamic::capacity], D[Dynamic::square_capacity];
  const auto finite = square_norm(Y, count) < T(Limits<Real<T>>::huge_square);
  for (int e = 0; e < count; e++) from[e] = select(finite, Y[e], Q[e]);
  jacobi_polar(from, U, size);
  defect(U, D, size);
  come_nearer(U, D, which, size);
  for (int e = 0; e < count; e++) Q[e] = select(which, U[e], Q[e]);
}

// Q <- Y (Y^T Y)^{-1/2} for Y (n x p, n >= p) of full rank.
//
// Z <- Z + Z D / 2 with D = I - Z^T Z turns an eigenvalue d of D into (3 d^2 + d^3)/4: squared at each step, and a
// matrix that is orthonormal but for the rounding errors of a product needs one. ||D||_F < 2 keeps every singular value
// of Z below sqrt(3), beyond which the iteration runs to -1. Lanes stop one by one, so that none feels its neighbours;
// those that start too far away or come no nearer (a column much shorter than another) take rotations.
template <class T, class Size>
MK_FN void nearest_orthonormal(const T* Y, T* Q, Size size) {
  const int count = size.n * size.p;
  T Z[Size::capacity], D[Size::square_capacity];
  MK_UNROLL
  for (int e = 0; e < count; e++) Z[e] = Y[e];
  T off = defect(Z, D, size);
  const auto near = off < T(4);
  auto going = near;
  for (int step = 0; step < 12; step++) {
    come_nearer(Z, D, going, size);
    // The step has left 3/8 of D^2 of an error in Z: nothing, where D^2 is below rounding.
    going = going & (off > T(Real<T>(0.5) * Limits<Real<T>>::epsilon));
    if (!any(going)) break;
    off = defect(Z, D, size);
  }
  const auto done = near & !going;
  if (any(!done)) {
    rotate_to_polar(Y, Q, Dynamic{size.n, size.p}, !done);
    MK_UNROLL
    for (int e = 0; e < count; e++) Z[e] = select(done, Z[e], Q[e]);
  }
  MK_UNROLL
  for (int e = 0; e < count; e++) Q[e] = Z[e];
}

}  // namespace mk
