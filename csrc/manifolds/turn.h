// Square orthogonal matrices W = s Q: all that a tangent vector does is to turn, V = W A with A skew. A has less than
// half of the numbers of V, and takes less than half of the work to find.
#pragma once

#include "linalg/givens.h"
#include "linalg/gram_schmidt.h"

namespace mk::stiefel {

// xi = Q A, A = skew(Q^T M): the rows of A above its diagonal, one after the other; returns ||xi||^2 = ||A||^2.
// inverse = 1/s.
template <class T, class Size>
MK_FN T turn(const T* W, const T* M, T inverse, T* A, Size size) {
  const int p = size.p;
  const T half = T(0.5) * inverse;
  T square = T(0);
  int e = 0;
  MK_UNROLL
  for (int i = 0; i < p; i++) {
    MK_UNROLL
    for (int j = i + 1; j < p; j++, e++) {
      T above = W[i] * M[j], below = W[j] * M[i];
      MK_UNROLL
      for (int k = 1; k < p; k++) {
        above = fma(W[k * p + i], M[k * p + j], above);
        below = fma(W[k * p + j], M[k * p + i], below);
      }
      A[e] = half * (above - below);
      square = fma(A[e], A[e], square);
    }
  }
  return square + square;
}

// Y = W (I + A), columns 0 to `columns` of it.
template <class T, class Size>
MK_FN void turned(const T* W, const T* A, T* Y, int columns, Size size) {
  const int p = size.p;
  MK_UNROLL
  for (int r = 0; r < p; r++) {
    int e = 0;
    MK_UNROLL
    for (int j = 0; j < columns; j++) Y[r * p + j] = W[r * p + j];
    MK_UNROLL
    for (int i = 0; i < p; i++) {
      MK_UNROLL
      for (int j = i + 1; j < p; j++, e++) {
        if (j < columns) Y[r * p + j] = fma(A[e], W[r * p + i], Y[r * p + j]);
        if (i < columns) Y[r * p + i] = fma(-A[e], W[r * p + j], Y[r * p + i]);
      }
    }
  }
}

// Turns that go too far for gram_schmidt() and are none of a sane step's: rotations serve all.
template <class T, class Size>
MK_RARE void retract_far(const T* W, const T* A, T scale, T* out, Size size) {
  T Y[Size::capacity];
  turned(W, A, Y, size.p, size);
  const T inverse = T(1) / scale;
  for (int e = 0; e < size.p * size.p; e++) Y[e] = Y[e] * inverse;
  givens_qf(Y, out, size);
  for (int e = 0; e < size.p * size.p; e++) out[e] = out[e] * scale;
}

// Y = s qf(Q + step xi), square = ||xi||^2, in the matrices whose mask is returned: up to ||step xi||^2 = 4 no singular
// value of I + step A is beyond sqrt(3). The last column of qf keeps to the side of the old one, at any step: its part
// along it is a positive multiple of a diagonal element of (I + step A)^-1, whose symmetric part is positive definite.
template <class T, class Size>
MK_FN auto retract_near(const T* W, const T* turn, T step, T square, T scale, T* Y, Size size) {
  const int p = size.p;
  T A[Size::square_capacity];
  MK_UNROLL
  for (int e = 0; e < p * (p - 1) / 2; e++) A[e] = step * turn[e];
  turned(W, A, Y, p == 3 ? 2 : p, size);
  return gram_schmidt(Y, scale, W + p - 1, size) & (step * step * square <= T(4));
}

// W <- s qf(Q + step xi), for any step.
template <class T, class Size>
MK_FN void retract_turn(T* W, const T* turn, T step, T square, T scale, Size size) {
  const int p = size.p;
  T near[Size::capacity], far[Size::capacity], A[Size::square_capacity];
  const auto is_near = retract_near(W, turn, step, square, scale, near, size);
  for (int e = 0; e < p * (p - 1) / 2; e++) A[e] = step * turn[e];
  retract_far(W, A, scale, far, size);
  for (int e = 0; e < p * p; e++) W[e] = select(is_near, near[e], far[e]);
}

}  // namespace mk::stiefel
