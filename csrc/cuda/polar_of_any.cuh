// The polar factor of linalg/polar_of_any.h for one matrix in shared memory, by a team of threads.
#pragma once

#include "cuda/householder.cuh"
#include "cuda/products.cuh"
#include "linalg/jacobi.h"

namespace mk {
namespace cuda {

// Y <- Y V with orthogonal columns, V (p x p) the product of rotations, as jacobi_rotate(). Pairs of different columns
// are turned side by side; which ones meet in a round is the schedule of a tournament.
template <class T, class R>
MK_DEVICE void jacobi_rotate(const SharedMatrix<R>& Y, const SharedMatrix<R>& V) {
  const int p = Y.p, players = p + p % 2, others = players - 1;
  each_element<T>(p * p, [&](int e) { V(e / p, e % p) = R(e / p == e % p ? 1 : 0); });
  for (int sweep = 0; sweep < most_sweeps; sweep++) {
    bool turned = false;
    for (int round = 0; round < others; round++) {
      each_column<T>(0, players / 2, [&](int pair, bool mine, int lane, int lanes) {
        const int one = pair == 0 ? others : (round + pair) % others, two = (round + others - pair) % others;
        const int a = one < two ? one : two, b = one < two ? two : one;
        mine = mine && b < p;  // of an odd number of columns one pauses
        R aa = R(0), bb = R(0), ab = R(0);
        if (mine) {
          for (int i = lane; i < p; i += lanes) {
            aa = fma(Y(i, a), Y(i, a), aa);
            bb = fma(Y(i, b), Y(i, b), bb);
            ab = fma(Y(i, a), Y(i, b), ab);
          }
        }
        aa = sum_over_lanes<T>(aa, lanes);
        bb = sum_over_lanes<T>(bb, lanes);
        ab = sum_over_lanes<T>(ab, lanes);
        const ColumnRotation<R> rotation(aa, bb, ab);
        if (!mine || rotation.still) return;
        turned = true;
        for (int i = lane; i < p; i += lanes) {
          rotation.apply(Y(i, a), Y(i, b));
          rotation.apply(V(i, a), V(i, b));
        }
      });
      T::sync();
    }
    if (!T::any(turned)) break;
  }
}

// Numbers of shared memory for a matrix n x p, n >= p: it, three p x p, reflections, and what is missing.
constexpr int polar_numbers(int n, int p) { return p * odd(n) + 3 * p * odd(p) + 5 * p; }

// q (n x p in memory, row after row) <- the polar factor of A, which lies at the beginning of polar_numbers(n, p).
template <class T, class R>
MK_DEVICE void polar_of_any(const SharedMatrix<R>& A, R* q) {
  const int n = A.n, p = A.p, apart = odd(p);
  R* next = A.at + p * odd(n);
  const auto take = [&](int count) {
    R* const here = next;
    next += count;
    return here;
  };
  SharedMatrix<R> Y = by_columns(take(p * apart), p, p), V = by_columns(take(p * apart), p, p);
  SharedMatrix<R> spare = by_columns(take(p * apart), p, p);
  R* const missing = take(p);
  const Reflections<R> of{take(p), take(p), take(p), take(p)};

  balance<T>(A, of);
  reflections<T>(A, of);
  R largest = of.magnitude[0];
  for (int j = 1; j < p; j++) largest = max(largest, of.magnitude[j]);
  const R unit = R(1) / largest;
  // R^T, of size one
  each_element<T>(p * p, [&](int e) {
    const int i = e / p, j = e % p;
    const R element = i < j ? R(0) : i == j ? of.diagonal[j] : A(j, i);
    Y(i, j) = element * (of.magnitude[i] * unit);
  });
  reflections_to_q<T>(A, of);

  jacobi_rotate<T>(Y, V);
  bool deficient = false;
  each_column<T>(0, p, [&](int c, bool mine, int lane, int lanes) {
    R square = R(0);
    if (mine)
      for (int i = lane; i < p; i += lanes) square = fma(Y(i, c), Y(i, c), square);
    square = sum_over_lanes<T>(square, lanes);
    const bool gone = square < negligible_square<R>;
    const R inverse = rsqrt(max(square, negligible_square<R>));
    if (!mine) return;
    for (int i = lane; i < p; i += lanes) Y(i, c) = gone ? R(0) : Y(i, c) * inverse;
    if (lane == 0) missing[c] = R(gone ? 1 : 0);
    deficient = deficient || gone;
  });
  deficient = T::any(deficient);
  T::sync();
  if (deficient) {
    // Those that are there first, then their completion.
    const auto place = [&](int c) {
      int before = 0;
      for (int k = 0; k < p; k++) before += missing[k] < missing[c] || (missing[k] == missing[c] && k < c);
      return before;
    };
    each_element<T>(p * p, [&](int e) { spare(e / p, place(e % p)) = Y(e / p, e % p); });
    each_element<T>(p * p, [&](int e) { Y(e / p, place(e % p)) = V(e / p, e % p); });
    reflections<T>(spare, of);
    reflections_to_q<T>(spare, of);
    const SharedMatrix<R> free = V;
    V = Y;
    Y = spare;
    spare = free;
  }
  // V U^T, row after row, and the rounding errors of all rotations out of it in one step.
  R *const factor = spare.at, *const defect = Y.at, *const nearer = V.at;
  product<true, T>(V.at, apart, Y.at, apart, p, p, p, [&](int i, int j, R x) { factor[i * p + j] = x; });
  product<true, T>(factor, p, factor, p, p, p, p,
                   [&](int i, int j, R x) { defect[i * p + j] = R(i == j ? 1 : 0) - x; });
  product<false, T>(factor, p, defect, p, p, p, p,
                    [&](int i, int j, R x) { nearer[i * p + j] = fma(R(0.5), x, factor[i * p + j]); });
  product<true, T>(A.at, A.across, nearer, p, n, p, p, [&](int i, int j, R x) { q[i * p + j] = x; });
}

}  // namespace cuda
}  // namespace mk
