// Unit columns: every column is a sphere.
#pragma once

#include "manifolds/sphere.h"

namespace mk::oblique {

template <class T, class Size>
MK_FN T project(const T* q, const T* m, T* xi, Size size) {
  T square = T(0);
  MK_UNROLL
  for (int j = 0; j < size.p; j++) square = square + sphere::project(q + j, m + j, xi + j, size.n, size.p);
  return square;
}

template <bool Exp, class T, class Size>
MK_FN void retract(T* q, const T* xi, T step, Size size) {
  MK_UNROLL
  for (int j = 0; j < size.p; j++) {
    sphere::Arc<T> arc = sphere::projection(step);
    if (Exp) {
      const T square = inner(xi + j, xi + j, size.n, size.p);
      arc = sphere::exp(step, square);
    }
    sphere::retract(q + j, xi + j, arc, size.n, size.p);
  }
}

}  // namespace mk::oblique
