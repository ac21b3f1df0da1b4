// The polar factor of any matrix, whatever its rank and condition.
#pragma once

#include "linalg/householder.h"
#include "linalg/jacobi.h"
#include "linalg/polar.h"

namespace mk {

// What the factor needs beside A: four matrices p x p and the vectors of two QR decompositions.
template <class T>
struct PolarWork {
  T *Y, *V, *M, *U;
  T* missing;  // p
  Reflections<T> of, of_completion;
};

// In the lanes where columns of U (p x p) are missing (1; else 0), they become some orthonormal completion of the
// others. Of U and V only U V^T matters, so that both put them behind the others first: a QR decomposition keeps
// orthonormal columns and goes on from there.
template <class T, class Size>
__attribute__((noinline)) void complete(PolarWork<T> work, Size size) {
  const int p = size.p;
  T *U = work.M, *V = work.V, *missing = work.missing;
  T deficient = T(0);
  for (int j = 0; j < p; j++) deficient = max(deficient, missing[j]);
  for (int end = p - 1; end > 0; end--) {
    for (int j = 0; j < end; j++) {
      const auto swap = missing[j] > missing[j + 1];
      const auto exchange = [&](T& a, T& b) {
        const T was = a;
        a = select(swap, b, a);
        b = select(swap, was, b);
      };
      exchange(missing[j], missing[j + 1]);
      for (int i = 0; i < p; i++) exchange(U[i * p + j], U[i * p + j + 1]);
      for (int i = 0; i < p; i++) exchange(V[i * p + j], V[i * p + j + 1]);
    }
  }
  T* Q = work.U;
  for (int i = 0; i < p; i++)
    for (int j = 0; j < p; j++) Q[j * p + i] = select(missing[j] > T(0), T(0), U[i * p + j]);
  householder(Q, work.of_completion, size);
  reflections_to_q(Q, work.of_completion, size);
  for (int i = 0; i < p; i++)
    for (int j = 0; j < p; j++) U[i * p + j] = select(deficient > T(0), Q[j * p + i], U[i * p + j]);
}

// Z <- the polar factor of A (n x p, n >= p), both column-major; A is overwritten.
//
// With A = Q R it is Q times the polar factor of R, whose transpose Jacobi rotations take to U S: R^T V = U S makes it
// V U^T. Singular values below rounding of the largest leave no direction in U, and any completion is as good.
// `square` is the size p x p.
template <class T, class Size, class Square>
MK_FN void polar_of_any(T* A, T* Z, PolarWork<T> work, Size size, Square square) {
  using R = Real<T>;
  const int n = size.n, p = size.p;
  householder(A, work.of, size);
  T largest = work.of.magnitude[0];
  for (int j = 1; j < p; j++) largest = max(largest, work.of.magnitude[j]);
  const T unit = T(1) / largest;
  T *Y = work.Y, *V = work.V, *M = work.M;
  for (int i = 0; i < p; i++) {
    work.of.magnitude[i] = work.of.magnitude[i] * unit;
    for (int j = 0; j < p; j++) Y[i * p + j] = element_of_r(A, work.of, n, j, i);
  }
  reflections_to_q(A, work.of, size);

  jacobi_rotate(Y, V, square);
  T deficient = T(0);
  for (int j = 0; j < p; j++) {
    T length = T(0);
    for (int i = 0; i < p; i++) length = fma(Y[i * p + j], Y[i * p + j], length);
    work.missing[j] = select(length < T(negligible_square<R>), T(1), T(0));
    deficient = max(deficient, work.missing[j]);
    const T inverse = rsqrt(max(length, T(negligible_square<R>)));
    for (int i = 0; i < p; i++) M[i * p + j] = Y[i * p + j] * inverse;
  }
  if (any(deficient > T(0))) complete(work, square);
  for (int i = 0; i < p; i++) {
    for (int j = 0; j < p; j++) {
      T sum = T(0);
      for (int k = 0; k < p; k++) sum = fma(V[i * p + k], M[j * p + k], sum);
      Y[i * p + j] = sum;
    }
  }
  // The rounding errors of all rotations, out in one step.
  defect(Y, V, square);
  come_nearer(Y, V, T(0) <= T(0), square);
  for (int j = 0; j < p; j++) {
    for (int i = 0; i < n; i++) {
      T sum = T(0);
      for (int k = 0; k < p; k++) sum = fma(A[k * n + i], Y[k * p + j], sum);
      Z[j * n + i] = sum;
    }
  }
}

}  // namespace mk
