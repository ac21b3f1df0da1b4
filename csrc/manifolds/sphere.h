// The unit sphere: points q, ambient m, tangent xi; vectors of any length. Scale is the caller's (q = w/s, v = V/s).
#pragma once

#include "lane.h"
#include "linalg/sine.h"
#include "linalg/small_matrix.h"

namespace mk::sphere {

// xi = m - q <q, m>, elementwise with qm = <q, m>.
template <class T>
MK_FN T rgrad(T q, T m, T qm) {
  return fma(-qm, q, m);
}

// A retraction of the tangent vector xi * step: a q + b xi, to be normalised.
template <class T>
struct Arc {
  T a, b;
};

// (q + v)/||q + v||
template <class T>
MK_FN Arc<T> projection(T step) {
  return {T(1), step};
}

// q cos||v|| + v/||v|| sin||v||; square = ||xi||^2. The quotient is a sinc: v = 0 gives q.
template <class T>
MK_FN Arc<T> exp(T step, T square) {
  const T norm = sqrt(square);
  const T angle = abs(step) * norm;
  const auto zero = !(norm > T(0));
  const SineCosine<T> at = sine_cosine(angle);
  const T along = at.sine / select(zero, T(1), norm);
  return {at.cosine, select(zero, step, select(step < T(0), -along, along))};
}

// The same in closed form. With q, d and their sums qq = <q, q>, qd = <q, d>, dd = <d, d>:

// ||d - qd q||^2. Where d is nearly radial it cancels, and is better taken element by element.
template <class T>
MK_FN T tangent_square(T qq, T qd, T dd) {
  return fma(-qd * (T(2) - qq), qd, dd);
}

// The normalised point of the arc along xi = d - qd q, square = ||xi||^2, as a combination a q + b d.
template <class T>
MK_FN Arc<T> combination(Arc<T> arc, T qq, T qd, T square) {
  const T radial = arc.b * qd;
  const T norm = fma(arc.b * arc.b, square, arc.a * fma(T(2) * radial, T(1) - qq, arc.a * qq));
  const T inverse = select(norm > T(0), rsqrt(norm), T(1));
  return {(arc.a - radial) * inverse, arc.b * inverse};
}

// Projection of m (length k, elements `stride` apart) and ||xi||^2.
template <class T>
MK_FN T project(const T* q, const T* m, T* xi, int k, int stride) {
  const T qm = inner(q, m, k, stride);
  MK_UNROLL
  for (int e = 0; e < k; e++) xi[e * stride] = rgrad(q[e * stride], m[e * stride], qm);
  return inner(xi, xi, k, stride);
}

// q <- the normalised point of the arc; a zero vector stays zero.
template <class T>
MK_FN void retract(T* q, const T* xi, Arc<T> arc, int k, int stride) {
  MK_UNROLL
  for (int e = 0; e < k; e++) q[e * stride] = fma(arc.b, xi[e * stride], arc.a * q[e * stride]);
  const T square = inner(q, q, k, stride);
  const T inverse = select(square > T(0), rsqrt(square), T(1));
  MK_UNROLL
  for (int e = 0; e < k; e++) q[e * stride] = q[e * stride] * inverse;
}

}  // namespace mk::sphere
