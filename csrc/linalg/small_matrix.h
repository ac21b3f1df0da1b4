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

// Sum of squares.
template <class T>
MK_FN T square_norm(const T* x, int size) {
  T sum = x[0] * x[0];
  MK_UNROLL
  for (int e = 1; e < size; e++) sum = fma(x[e], x[e], sum);
  return sum;
}

}  // namespace mk
