// Products of small row-major matrices on a lane type.
#pragma once

#include "lane.h"

namespace mk {

// C (a x b) = A^T B for A (k x a), B (k x b).
template <class T>
MK_FN void multiply_tn(const T* A, const T* B, T* C, int k, int a, int b) {
  MK_UNROLL
  for (int i = 0; i < a; i++) {
    MK_UNROLL
    for (int j = 0; j < b; j++) {
      T sum = A[i] * B[j];
      MK_UNROLL
      for (int l = 1; l < k; l++) sum = fma(A[l * a + i], B[l * b + j], sum);
      C[i * b + j] = sum;
    }
  }
}

// C (a x b) = A B for A (a x k), B (k x b).
template <class T>
MK_FN void multiply(const T* A, const T* B, T* C, int a, int k, int b) {
  MK_UNROLL
  for (int i = 0; i < a; i++) {
    MK_UNROLL
    for (int j = 0; j < b; j++) {
      T sum = A[i * k] * B[j];
      MK_UNROLL
      for (int l = 1; l < k; l++) sum = fma(A[i * k + l], B[l * b + j], sum);
      C[i * b + j] = sum;
    }
  }
}

// <x, y> of vectors of length k whose elements are `stride` apart, in three sums: one would be a chain of multiply-adds
// that each wait for the last.
template <class T>
MK_FN T inner(const T* x, const T* y, int k, int stride) {
  T a = T(0), b = T(0), c = T(0);
  int e = 0;
  MK_UNROLL
  for (; e + 3 <= k; e += 3) {
    a = fma(x[e * stride], y[e * stride], a);
    b = fma(x[(e + 1) * stride], y[(e + 1) * stride], b);
    c = fma(x[(e + 2) * stride], y[(e + 2) * stride], c);
  }
  MK_UNROLL
  for (; e < k; e++) a = fma(x[e * stride], y[e * stride], a);
  return (a + b) + c;
}

template <class T>
MK_FN T square_norm(const T* x, int size) {
  return inner(x, x, size, 1);
}

}  // namespace mk
