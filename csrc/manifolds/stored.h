// Square orthogonal matrices W = s Q that were stored in 16 bits: orthogonal to that rounding only, so that a tangent
// vector does not only turn (turn.h), while Gram and Schmidt still serve.
#pragma once

#include "linalg/givens.h"
#include "linalg/gram_schmidt.h"
#include "linalg/small_matrix.h"

namespace mk::stiefel {

// xi = M - Q sym(Q^T M); returns ||xi||^2. inverse = 1/s.
template <class T, class Size>
MK_FN T project_stored(const T* W, const T* M, T inverse, T* xi, Size size) {
  const int p = size.p;
  T A[Size::square_capacity];
  multiply_tn(W, M, A, p, p, p);
  const T minus = -inverse, half = T(0.5) * minus;
  // -sym(Q^T M)/s
  MK_UNROLL
  for (int i = 0; i < p; i++) {
    A[i * p + i] = minus * A[i * p + i] * inverse;
    MK_UNROLL
    for (int j = i + 1; j < p; j++) A[i * p + j] = A[j * p + i] = half * (A[i * p + j] + A[j * p + i]) * inverse;
  }
  MK_UNROLL
  for (int i = 0; i < p; i++) {
    MK_UNROLL
    for (int j = 0; j < p; j++) {
      T x = M[i * p + j];
      MK_UNROLL
      for (int k = 0; k < p; k++) x = fma(W[i * p + k], A[k * p + j], x);
      xi[i * p + j] = x;
    }
  }
  return square_norm(xi, p * p);
}

// Y = s qf(Q + step xi), square = ||xi||^2, in the matrices whose mask is returned. The last column of Y keeps to the
// side of the last one of Q + step xi, as the diagonal of R wants it.
template <class T, class Size>
MK_FN auto retract_stored_near(const T* W, const T* xi, T step, T square, T scale, T* Y, Size size) {
  const int p = size.p;
  const T length = scale * step;
  MK_UNROLL
  for (int e = 0; e < p * p; e++) Y[e] = fma(length, xi[e], W[e]);
  return gram_schmidt(Y, scale, Y + p - 1, size) & (step * step * square <= T(4));
}

// W <- s qf(Q + step xi), for any step.
template <class T, class Size>
MK_FN void retract_stored(T* W, const T* xi, T step, T square, T scale, Size size) {
  const int p = size.p;
  T near[Size::capacity], far[Size::capacity], Y[Size::capacity];
  const auto is_near = retract_stored_near(W, xi, step, square, scale, near, size);
  const T inverse = T(1) / scale;
  for (int e = 0; e < p * p; e++) Y[e] = fma(step, xi[e], W[e] * inverse);
  givens_qf(Y, far, size);
  for (int e = 0; e < p * p; e++) W[e] = select(is_near, near[e], far[e] * scale);
}

}  // namespace mk::stiefel
