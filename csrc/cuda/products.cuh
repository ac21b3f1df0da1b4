// Small dense linear algebra by a team of threads on matrices in shared memory, row after row without padding. Every
// function ends with the team at one point, its results seen by all.
//
// Loops are unrolled by hand: nvcc's four times would take three times as long to compile and a third more registers.
#pragma once

#include "cuda/reduce.cuh"

namespace mk {
namespace cuda {

// f(i, j, sum over l of A_il B_lj) for C = A B, or with Transposed A^T B (A is inner x rows then). Neither is written
// to by f. A thread has 4 x 4 elements of C, neighbouring threads neighbouring columns, so that every number loaded is
// used four times.
template <bool Transposed, class T, class R, class F>
MK_DEVICE void product(const R* A, int a_stride, const R* B, int b_stride, int rows, int inner, int columns,
                       const F& f) {
  const int row_tiles = (rows + 3) / 4, column_tiles = (columns + 3) / 4;
  for (int tile = T::rank(); tile < row_tiles * column_tiles; tile += T::size) {
    const int i0 = tile / column_tiles * 4, j0 = tile % column_tiles;
    R sum[4][4] = {};
    int row[4], column[4];
    MK_UNROLL
    for (int k = 0; k < 4; k++) {
      row[k] = i0 + k < rows ? i0 + k : rows - 1;
      column[k] = j0 + k * column_tiles < columns ? j0 + k * column_tiles : columns - 1;
    }
#pragma unroll 2
    for (int l = 0; l < inner; l++) {
      R a[4], b[4];
      MK_UNROLL
      for (int k = 0; k < 4; k++) {
        a[k] = Transposed ? A[l * a_stride + row[k]] : A[row[k] * a_stride + l];
        b[k] = B[l * b_stride + column[k]];
      }
      MK_UNROLL
      for (int r = 0; r < 4; r++) {
        MK_UNROLL
        for (int c = 0; c < 4; c++) sum[r][c] = fma(a[r], b[c], sum[r][c]);
      }
    }
    MK_UNROLL
    for (int r = 0; r < 4; r++) {
      MK_UNROLL
      for (int c = 0; c < 4; c++)
        if (i0 + r < rows && j0 + c * column_tiles < columns) f(i0 + r, j0 + c * column_tiles, sum[r][c]);
    }
  }
  T::sync();
}

// f(e) for e in [0, count).
template <class T, class F>
MK_DEVICE void each_element(int count, const F& f) {
#pragma unroll 1
  for (int e = T::rank(); e < count; e += T::size) f(e);
  T::sync();
}

template <class T, class R>
MK_DEVICE R sum_of_squares(const R* x, int count) {
  R sum = R(0);
#pragma unroll 1
  for (int e = T::rank(); e < count; e += T::size) sum = fma(x[e], x[e], sum);
  return T::sum(sum);
}

// E = exp(A) for A (m x m), which is overwritten, as linalg/expm.h. Returns where E lies: one of the two.
template <class T, class R>
MK_DEVICE R* exponential(R* A, R* E, R* work, int m) {
  // ||A||_F bounds the norm that expm.h takes.
  const R square = sum_of_squares<T>(A, m * m);
  int halvings = 0;
  R factor = R(1);
  while (square * factor * factor > R(0.25) && halvings < 60) {
    factor = factor * R(0.5);
    halvings++;
  }
  each_element<T>(m * m, [&](int e) {
    A[e] = A[e] * factor;
    E[e] = R(e % (m + 1) == 0 ? 1 : 0);
  });
  const int degree = sizeof(R) == sizeof(float) ? 8 : 14;
  // Horner: E <- I + A E / k
  for (int k = degree; k >= 1; k--) {
    const R inverse = R(1) / R(k);
    product<false, T>(A, m, E, m, m, m, m,
                      [&](int i, int j, R x) { work[i * m + j] = fma(x, inverse, R(i == j ? 1 : 0)); });
    R* const swapped = E;
    E = work;
    work = swapped;
  }
  for (int k = 0; k < halvings; k++) {
    product<false, T>(E, m, E, m, m, m, m, [&](int i, int j, R x) { work[i * m + j] = x; });
    R* const swapped = E;
    E = work;
    work = swapped;
  }
  return E;
}

// X with K X = B by Gauss-Jordan elimination with row pivots: M = [K B] (m x (m + b)) becomes [. X].
template <class T, class R>
MK_DEVICE void solve(R* M, int m, int b) {
  const int stride = m + b;
  for (int c = 0; c < m; c++) {
    int pivot = c;
    for (int r = c + 1; r < m; r++)
      if (abs(M[r * stride + c]) > abs(M[pivot * stride + c])) pivot = r;
    T::sync();  // all have found it
    if (pivot != c)
      each_element<T>(stride, [&](int k) {
        const R x = M[c * stride + k];
        M[c * stride + k] = M[pivot * stride + k];
        M[pivot * stride + k] = x;
      });
    const R inverse = R(1) / M[c * stride + c];
    const int width = stride - c - 1;
    each_element<T>(m * width, [&](int e) {
      const int r = e / width, k = c + 1 + e % width;
      if (r != c) M[r * stride + k] = fma(-(M[r * stride + c] * inverse), M[c * stride + k], M[r * stride + k]);
    });
  }
  each_element<T>(m * b, [&](int e) {
    const int r = e / b, k = m + e % b;
    M[r * stride + k] = M[r * stride + k] / M[r * stride + r];
  });
}

// The polar factor of Y (n x p) by Newton-Schulz iteration: singular values in (0, sqrt(3)) go to 1, small ones by
// factors of 3/2. Y, Z and G (p x p) are overwritten; the result lies in what is returned, Y or Z.
template <class T, class R>
MK_DEVICE R* polar_factor(R* Y, R* Z, R* G, int n, int p) {
  for (int step = 0; step < 60; step++) {
    product<true, T>(Y, p, Y, p, p, n, p, [&](int i, int j, R x) { G[i * p + j] = R(i == j ? 1 : 0) - x; });
    const R off = sum_of_squares<T>(G, p * p);
    product<false, T>(Y, p, G, p, n, p, p, [&](int i, int j, R x) { Z[i * p + j] = fma(R(0.5), x, Y[i * p + j]); });
    R* const swapped = Y;
    Y = Z;
    Z = swapped;
    // The step has left 3/8 of G^2 of an error: nothing, where G^2 is below rounding.
    if (!(off > R(0.5) * Limits<R>::epsilon)) break;
  }
  return Y;
}

// qf(Y) for Y (n x p) near to orthonormal: X <- X (I - up(X^T X - I)), up the strict upper triangle plus half the
// diagonal, squares the distance at each step. Returns where it lies, Y or Z; null where Y is too far away, as it was.
template <class T, class R>
MK_DEVICE R* orthonormal_by_products(R* Y, R* Z, R* G, int n, int p) {
  for (int step = 0; step < 8; step++) {
    product<true, T>(Y, p, Y, p, p, n, p, [&](int i, int j, R x) { G[i * p + j] = x - R(i == j ? 1 : 0); });
    const R off = sum_of_squares<T>(G, p * p);
    if (step == 0 && !(off < R(0.0625))) return nullptr;
    each_element<T>(p * p, [&](int e) {
      const int i = e / p, j = e % p;
      G[e] = i < j ? G[e] : i == j ? R(0.5) * G[e] : R(0);
    });
    product<false, T>(Y, p, G, p, n, p, p, [&](int i, int j, R x) { Z[i * p + j] = Y[i * p + j] - x; });
    R* const swapped = Y;
    Y = Z;
    Z = swapped;
    if (!(off > R(0.25) * Limits<R>::epsilon)) break;
  }
  return Y;
}

}  // namespace cuda
}  // namespace mk
