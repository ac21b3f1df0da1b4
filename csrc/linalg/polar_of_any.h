// The polar factor of any matrix, whatever its rank and condition.
#pragma once

#include "linalg/householder.h"
#include "linalg/jacobi.h"
#include "linalg/polar.h"

namespace mk {

// What the factor needs beside A, whose columns are p: matrices p x p and the vectors of two QR decompositions.
template <class T>
struct PolarWork {
  T *Y, *V, *U;
  T* missing;  // p
  Reflections<T> of, of_completion;
};

// As it lies in so many numbers of memory.
constexpr int polar_work_numbers(int p) { return 3 * p * p + p + 2 * reflections_numbers(p, p); }
template <class T>
MK_FN PolarWork<T> polar_work_at(T* memory, int p) {
  const int square = p * p;
  T* const rest = memory + 3 * square + p;
  return {memory,
          memory + square,
          memory + 2 * square,
          memory + 3 * square,
          reflections_at(rest, p),
          reflections_at(rest + reflections_numbers(p, p), p)};
}

// C (a x b) = A B^T for A (a x k), B (b x k), column-major; four elements at a time, whose sums do not wait for
// another.
template <class T>
MK_FN void multiply_nt(const T* A, const T* B, T* C, int a, int b, int k) {
  MK_UNROLL
  for (int j = 0; j < b; j++) {
    MK_UNROLL
    for (int i = 0; i < a; i += 4) {
      T sum[4] = {T(0), T(0), T(0), T(0)};
      const int count = a - i < 4 ? a - i : 4;
      MK_UNROLL
      for (int l = 0; l < k; l++) {
        MK_UNROLL
        for (int e = 0; e < 4; e++)
          if (e < count) sum[e] = fma(A[l * a + i + e], B[l * b + j], sum[e]);
      }
      MK_UNROLL
      for (int e = 0; e < 4; e++)
        if (e < count) C[j * a + i + e] = sum[e];
    }
  }
}

// In the lanes where columns of U (p x p) are missing (1; else 0), they become some orthonormal completion of the
// others. Of U and V only U V^T matters, so that both put them behind the others first: a QR decomposition keeps
// orthonormal columns and goes on from there. Y is overwritten.
template <class T, class Square>
MK_FN void complete(PolarWork<T> work, Square size) {
  const int p = size.p;
  T *U = work.U, *V = work.V, *Q = work.Y, *missing = work.missing;
  T deficient = T(0);
  MK_UNROLL
  for (int j = 0; j < p; j++) deficient = max(deficient, missing[j]);
  MK_UNROLL
  for (int end = p - 1; end > 0; end--) {
    MK_UNROLL
    for (int j = 0; j < end; j++) {
      const auto swap = missing[j] > missing[j + 1];
      const auto exchange = [&](T& a, T& b) {
        const T was = a;
        a = select(swap, b, a);
        b = select(swap, was, b);
      };
      exchange(missing[j], missing[j + 1]);
      MK_UNROLL
      for (int i = 0; i < p; i++) exchange(U[j * p + i], U[(j + 1) * p + i]);
      MK_UNROLL
      for (int i = 0; i < p; i++) exchange(V[j * p + i], V[(j + 1) * p + i]);
    }
  }
  MK_UNROLL
  for (int j = 0; j < p; j++) {
    MK_UNROLL
    for (int i = 0; i < p; i++) Q[j * p + i] = select(missing[j] > T(0), T(0), U[j * p + i]);
  }
  householder(Q, work.of_completion, size);
  reflections_to_q(Q, work.of_completion, size);
  MK_UNROLL
  for (int e = 0; e < p * p; e++) U[e] = select(deficient > T(0), Q[e], U[e]);
}

template <class T>
MK_RARE void complete(PolarWork<T> work, RunTimeSize size) {
  complete<T, RunTimeSize>(work, size);
}

// Z <- the polar factor of A (n x p, n >= p), both column-major; A is overwritten. `square` is the size p x p.
//
// With A = Q R it is Q times the polar factor of R, and that of R^T is U V^T where Jacobi rotations make R^T V = U S.
// Singular values below rounding of the largest leave no direction in U, and any completion is as good.
template <class T, class Size, class Square>
MK_FN void polar_of_any(T* A, T* Z, PolarWork<T> work, Size size, Square square) {
  using R = Real<T>;
  const int n = size.n, p = size.p;
  householder(A, work.of, size);
  T largest = work.of.magnitude[0];
  MK_UNROLL
  for (int j = 1; j < p; j++) largest = max(largest, work.of.magnitude[j]);
  const T unit = T(1) / largest;
  T *Y = work.Y, *V = work.V, *U = work.U;
  MK_UNROLL
  for (int i = 0; i < p; i++) {
    work.of.magnitude[i] = work.of.magnitude[i] * unit;
    MK_UNROLL
    for (int j = 0; j < p; j++) Y[j * p + i] = element_of_r(A, work.of, n, j, i);
  }
  reflections_to_q(A, work.of, size);

  jacobi_rotate<ColumnMajor>(Y, V, square);
  T deficient = T(0);
  MK_UNROLL
  for (int j = 0; j < p; j++) {
    const T length = square_norm(Y + j * p, p);
    work.missing[j] = select(length < T(negligible_square<R>), T(1), T(0));
    deficient = max(deficient, work.missing[j]);
    const T inverse = rsqrt(max(length, T(negligible_square<R>)));
    MK_UNROLL
    for (int i = 0; i < p; i++) U[j * p + i] = Y[j * p + i] * inverse;
  }
  if (any(deficient > T(0))) complete(work, square);
  T* factor = Y;
  multiply_nt(U, V, factor, p, p, p);
  // The rounding errors of all rotations, out in one step: of the transposed matrix, which is as orthonormal.
  defect(factor, U, square);
  come_nearer(factor, U, T(0) <= T(0), square);
  multiply_nt(A, factor, Z, n, p, p);
}

}  // namespace mk
