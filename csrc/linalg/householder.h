// The thin QR decomposition of any matrix by Householder reflections: no pivoting, no branch on data, every lane in
// step. Matrices are column-major here: element (i, j) of an n x p one stands at j n + i.
#pragma once

#include "lane.h"
#include "linalg/power_of_two.h"
#include "linalg/small_matrix.h"

namespace mk {

// What the decomposition of A (n x p) leaves beside it, k = min(n, p). A itself holds R above the diagonal and, from
// the diagonal down, the vectors v_j of the reflections H_j = I - weight_j v_j v_j^T.
template <class T>
struct Reflections {
  T* weight;     // k numbers; 0 where H_j = I
  T* diagonal;   // k: of R, >= 0
  T* sign;       // k: column j of Q is sign_j H_0 ... H_j e_j
  T* magnitude;  // p powers of two that the columns of A were divided by; those of R are still to be multiplied by them
};

// C neighbouring columns from row `from` down: A <- (I - weight v v^T) A. Several at a time, since the sum of one is a
// chain of multiply-adds that each wait for the last.
template <int C, class T>
MK_FN void reflect(const T* v, T weight, T* columns, int n, int from) {
  T sum[C];
  MK_UNROLL
  for (int c = 0; c < C; c++) sum[c] = T(0);
  for (int i = from; i < n; i++) {
    MK_UNROLL
    for (int c = 0; c < C; c++) sum[c] = fma(v[i], columns[c * n + i], sum[c]);
  }
  MK_UNROLL
  for (int c = 0; c < C; c++) sum[c] = -(sum[c] * weight);
  for (int i = from; i < n; i++) {
    MK_UNROLL
    for (int c = 0; c < C; c++) columns[c * n + i] = fma(v[i], sum[c], columns[c * n + i]);
  }
}

template <class T>
MK_FN void reflect_columns(const T* v, T weight, T* A, int n, int from, int begin, int end) {
  int j = begin;
  for (; j + 4 <= end; j += 4) reflect<4>(v, weight, A + j * n, n, from);
  for (; j + 2 <= end; j += 2) reflect<2>(v, weight, A + j * n, n, from);
  for (; j < end; j++) reflect<1>(v, weight, A + j * n, n, from);
}

// Divides every column by a power of two, so that no square leaves the range: the columns of R have the same factors
// and Q has none. A matrix with NaN or Inf becomes NaN altogether.
template <class T, class Size>
MK_FN void balance(T* A, Reflections<T> of, Size size) {
  const int n = size.n, p = size.p;
  T poison = T(0);
  for (int e = 0; e < n * p; e++) poison = fma(A[e], T(0), poison);
  for (int j = 0; j < p; j++) {
    T largest = T(0);
    for (int i = 0; i < n; i++) largest = max(largest, abs(A[j * n + i]));
    of.magnitude[j] = magnitude(largest);
    const T inverse = T(1) / of.magnitude[j];
    for (int i = 0; i < n; i++) A[j * n + i] = fma(A[j * n + i], inverse, poison);
  }
}

// A = Q R with diag(R) >= 0 for any A: where the rest of a column is zero, H_j = I, so that Q is orthonormal always.
template <class T, class Size>
MK_FN void householder(T* A, Reflections<T> of, Size size) {
  const int n = size.n, p = size.p, k = n < p ? n : p;
  balance(A, of, size);
  for (int j = 0; j < k; j++) {
    T* v = A + j * n;
    const T alpha = v[j];
    const auto below = alpha < T(0);
    if (j == n - 1) {  // a row: nothing to reflect; NaN is to reach the sign
      of.weight[j] = T(0);
      of.sign[j] = fma(alpha, T(0), select(below, T(-1), T(1)));
      of.diagonal[j] = abs(alpha);
    } else {
      const T square = inner(v + j, v + j, n - j, 1);
      const auto zero = square < T(Limits<Real<T>>::tiny_square);
      const T length = sqrt(select(zero, T(1), square));
      const T longer = length + abs(alpha);
      // H_j x = -sign(alpha) |x| e_0, the sign that cancels nothing.
      v[j] = select(below, -longer, longer);
      of.weight[j] = select(zero, T(0), T(1) / (length * longer));
      of.sign[j] = select(below, T(1), T(-1)) * select(zero, T(-1), T(1));
      of.diagonal[j] = select(zero, abs(alpha), length);
      reflect_columns(v, of.weight[j], A, n, j, j + 1, p);
    }
    for (int c = j + 1; c < p; c++) A[c * n + j] = A[c * n + j] * of.sign[j];
  }
}

// The first k columns of A, which hold the reflections, become Q (n x k).
template <class T, class Size>
MK_FN void reflections_to_q(T* A, Reflections<T> of, Size size) {
  const int n = size.n, k = n < size.p ? n : size.p;
  for (int j = k - 1; j >= 0; j--) {
    T* v = A + j * n;
    for (int c = j + 1; c < k; c++) A[c * n + j] = T(0);
    reflect_columns(v, of.weight[j], A, n, j, j + 1, k);
    const T factor = -(of.weight[j] * v[j] * of.sign[j]);
    const T head = fma(factor, v[j], of.sign[j]);
    for (int i = j + 1; i < n; i++) v[i] = v[i] * factor;
    v[j] = head;
  }
}

// Element (i, j) of R.
template <class T>
MK_FN T element_of_r(const T* A, Reflections<T> of, int n, int i, int j) {
  if (i > j) return T(0);
  return (i == j ? of.diagonal[j] : A[j * n + i]) * of.magnitude[j];
}

}  // namespace mk
