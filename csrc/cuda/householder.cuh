// The QR decomposition of linalg/householder.h for one matrix in shared memory, by a team of threads. Every function
// ends with the team at one point, its results seen by all.
#pragma once

#include "cuda/reduce.cuh"
#include "linalg/householder.h"

namespace mk {
namespace cuda {

// An n x p matrix in shared memory.
template <class R>
struct SharedMatrix {
  R* at;
  int n, p;
  int down, across;  // how far the next row is, and the next column
  MK_DEVICE R& operator()(int i, int j) const { return at[i * down + j * across]; }
};

// Column after column, an odd number apart: threads with one column each meet in no bank, nor do those of one column.
constexpr int odd(int rows) { return rows | 1; }
template <class R>
MK_DEVICE SharedMatrix<R> by_columns(R* at, int n, int p) {
  return {at, n, p, 1, odd(n)};
}

// f(column, mine, lane, lanes) for the columns [begin, end), each by `lanes` neighbouring threads of a warp, a power of
// two, as many as keep the team busy. All threads call f, so that it may shuffle; those that are left over are not
// `mine`.
template <class T, class F>
MK_DEVICE void each_column(int begin, int end, const F& f) {
  int lanes = 1;
  while (lanes < 32 && 2 * lanes * (end - begin) <= T::size) lanes *= 2;
  for (int first = begin; first < end; first += T::size / lanes) {
    const int column = first + T::rank() / lanes;
    f(column, column < end, T::rank() % lanes, lanes);
  }
}

// What `join` makes of the numbers of the lanes of a column; all of them get it.
template <class T, class R, class F>
MK_DEVICE R over_lanes(R x, int lanes, const F& join) {
  for (int across = lanes / 2; across > 0; across /= 2) x = join(x, __shfl_xor_sync(T::mask(), x, across));
  return x;
}
template <class T, class R>
MK_DEVICE R sum_over_lanes(R x, int lanes) {
  return over_lanes<T>(x, lanes, [](R a, R b) { return a + b; });
}

// The columns [begin, end) of A by H_j, whose vector is column j from row j down.
template <class T, class R>
MK_DEVICE void reflect(const SharedMatrix<R>& A, R weight, int j, int begin, int end) {
  each_column<T>(begin, end, [&](int c, bool mine, int lane, int lanes) {
    R sum = R(0);
    if (mine)
      for (int i = j + lane; i < A.n; i += lanes) sum = fma(A(i, j), A(i, c), sum);
    sum = -(sum_over_lanes<T>(sum, lanes) * weight);
    if (mine)
      for (int i = j + lane; i < A.n; i += lanes) A(i, c) = fma(A(i, j), sum, A(i, c));
  });
  T::sync();
}

template <class T, class R>
MK_DEVICE void balance(const SharedMatrix<R>& A, Reflections<R> of) {
  bool sick = false;
  each_column<T>(0, A.p, [&](int c, bool mine, int lane, int lanes) {
    R largest = R(0);
    if (mine) {
      for (int i = lane; i < A.n; i += lanes) {
        largest = max(largest, abs(A(i, c)));
        sick = sick || !(A(i, c) * R(0) == R(0));
      }
    }
    largest = over_lanes<T>(largest, lanes, [](R a, R b) { return max(a, b); });
    if (mine && lane == 0) of.magnitude[c] = mk::magnitude(largest);
  });
  const R poison = T::any(sick) ? R(__builtin_nan("")) : R(0);
  T::sync();
  each_column<T>(0, A.p, [&](int c, bool mine, int lane, int lanes) {
    if (!mine) return;
    const R inverse = R(1) / of.magnitude[c];
    for (int i = lane; i < A.n; i += lanes) A(i, c) = fma(A(i, c), inverse, poison);
  });
  T::sync();
}

// Q and R of A, as householder() leaves them but without balance(): for columns whose squares stay in range.
template <class T, class R>
MK_DEVICE void reflections(const SharedMatrix<R>& A, Reflections<R> of) {
  const int k = A.n < A.p ? A.n : A.p;
  for (int j = 0; j < k; j++) {
    R square = R(0);
    for (int i = j + T::rank(); i < A.n; i += T::size) square = fma(A(i, j), A(i, j), square);
    square = T::sum(square);
    const Reflection<R> h = j == A.n - 1 ? Reflection<R>(A(j, j)) : Reflection<R>(A(j, j), square);
    T::sync();  // all have read the corner
    if (T::rank() == 0) {
      A(j, j) = h.first;
      of.weight[j] = h.weight;
      of.diagonal[j] = h.diagonal;
      of.sign[j] = h.sign;
    }
    T::sync();
    reflect<T>(A, h.weight, j, j + 1, A.p);
    for (int c = j + 1 + T::rank(); c < A.p; c += T::size) A(j, c) = A(j, c) * h.sign;
  }
  T::sync();
}

// Q in the first k columns of A, as reflections_to_q().
template <class T, class R>
MK_DEVICE void reflections_to_q(const SharedMatrix<R>& A, Reflections<R> of) {
  const int k = A.n < A.p ? A.n : A.p;
  for (int j = k - 1; j >= 0; j--) {
    for (int c = j + 1 + T::rank(); c < k; c += T::size) A(j, c) = R(0);
    T::sync();
    reflect<T>(A, of.weight[j], j, j + 1, k);
    const R corner = A(j, j), sign = of.sign[j], factor = -(of.weight[j] * corner * sign);
    T::sync();  // all have read it
    for (int i = j + T::rank(); i < A.n; i += T::size) A(i, j) = i == j ? fma(factor, corner, sign) : A(i, j) * factor;
  }
  T::sync();
}

}  // namespace cuda
}  // namespace mk
