// Manifolds with a retraction, in the one form that kernels for small matrices call, here and in csrc/cuda. Every
// function is inlined wherever it is called, whatever the instruction set.
#pragma once

#include <type_traits>

#include "cpu/job.h"
#include "manifolds/oblique.h"
#include "manifolds/sphere.h"
#include "manifolds/stiefel.h"
#include "manifolds/stored.h"
#include "manifolds/turn.h"

namespace mk {

// A manifold with a retraction. In general, project(q, d, tangent, size) -> ||xi||^2 and retract(q, tangent, step,
// square, size): q <- R_q(step xi), at unit scale, with at most n p numbers in `tangent`.
//
// turns<Size>: turn(w, d, inverse, tangent, size) and retract_turn(w, tangent, step, square, scale, size) in their
// place, for weights as they are.
//
// is_linear<Size>: all that the retraction needs are `sums` sums, and it ends on a combination of weight and direction,
// which can be formed as they lie in memory: observe(w, d, inverse, sums, size) -> ||xi||^2 for a weight that is
// still to be multiplied by `inverse`, and arc(sums, step, square, &combined): a, b with R_q(step xi) = a q + b d,
// returning the mask of the matrices for which that is accurate and in range.
struct ByTangent {
  template <class Size>
  static constexpr bool is_linear = false;
  template <class Size>
  static constexpr bool turns = false;
};

template <bool Exp>
struct SphereMap {
  template <class Size>
  static constexpr bool turns = false;
  template <class Size>
  static constexpr bool is_linear = !std::is_same<Size, Dynamic>::value;
  static constexpr int sums = 2;

  template <class T>
  MK_FN static sphere::Arc<T> along(T step, T square) {
    return Exp ? sphere::exp(step, square) : sphere::projection(step);
  }
  template <class T, class Size>
  MK_FN static T observe(const T* w, const T* d, T inverse, T* sums, Size size) {
    const int k = size.n * size.p;
    const T dd = square_norm(d, k), qd = inner(w, d, k, 1) * inverse, qq = square_norm(w, k) * inverse * inverse;
    T square = sphere::tangent_square(qq, qd, dd);
    const auto cancels = square < T(0.0625) * dd;
    if (any(cancels)) {
      T xi[Size::capacity];
      for (int e = 0; e < k; e++) xi[e] = sphere::rgrad(w[e] * inverse, d[e], qd);
      square = select(cancels, square_norm(xi, k), square);
    }
    sums[0] = qq;
    sums[1] = qd;
    return square;
  }
  template <class T>
  MK_FN static auto arc(const T* sums, T step, T square, sphere::Arc<T>* combined) {
    const sphere::Arc<T> arc = along(step, square);
    *combined = sphere::combination(arc, sums[0], sums[1], square);
    // Where the radial part of d is long against the result, the combination cancels.
    const T radial = arc.b * sums[1], rest = fma(step * step, square, sums[0] * sums[0]);
    return fma(radial, radial, T(Limits<Real<T>>::tiny_square) * rest) <= T(0.25);
  }

  template <class T, class Size>
  MK_FN static T project(const T* q, const T* m, T* xi, Size size) {
    return sphere::project(q, m, xi, size.n * size.p, 1);
  }
  template <class T, class Size>
  MK_FN static void retract(T* q, const T* xi, T step, T square, Size size) {
    sphere::retract(q, xi, along(step, square), size.n * size.p, 1);
  }
};

template <bool Exp>
struct ObliqueMap : ByTangent {
  template <class T, class Size>
  MK_FN static T project(const T* q, const T* m, T* xi, Size size) {
    return oblique::project(q, m, xi, size);
  }
  template <class T, class Size>
  MK_FN static void retract(T* q, const T* xi, T step, T, Size size) {
    oblique::retract<Exp>(q, xi, step, size);
  }
};

// Exact: Q is orthonormal to the precision of the arithmetic, which it is not where it was stored in 16 bits.
template <Retraction Kind, bool Exact = false>
struct StiefelMap : ByTangent {
  template <class Size>
  static constexpr bool turns =
      Kind == Retraction::qr && !std::is_same<Size, Dynamic>::value && Size::capacity == Size::square_capacity;

  template <class T, class Size>
  MK_FN static T turn(const T* w, const T* d, T inverse, T* tangent, Size size) {
    if constexpr (Exact) return stiefel::turn(w, d, inverse, tangent, size);
    return stiefel::project_stored(w, d, inverse, tangent, size);
  }
  template <class T, class Size>
  MK_FN static auto retract_near(const T* w, const T* tangent, T step, T square, T scale, T* y, Size size) {
    if constexpr (Exact) return stiefel::retract_near(w, tangent, step, square, scale, y, size);
    return stiefel::retract_stored_near(w, tangent, step, square, scale, y, size);
  }
  template <class T, class Size>
  MK_FN static void retract_turn(T* w, const T* tangent, T step, T square, T scale, Size size) {
    if constexpr (Exact) return stiefel::retract_turn(w, tangent, step, square, scale, size);
    stiefel::retract_stored(w, tangent, step, square, scale, size);
  }

  template <class T, class Size>
  MK_FN static T project(const T* q, const T* m, T* xi, Size size) {
    return stiefel::project(q, m, xi, size);
  }
  template <class T, class Size>
  MK_FN static void retract(T* q, const T* xi, T step, T square, Size size) {
    if constexpr (Kind == Retraction::cayley || Kind == Retraction::exp) step = stiefel::cut(step, square);
    if constexpr (Kind == Retraction::qr) stiefel::retract_qr(q, xi, step, size);
    if constexpr (Kind == Retraction::polar) stiefel::retract_polar(q, xi, step, square, size);
    if constexpr (Kind == Retraction::cayley) stiefel::retract_cayley(q, xi, step, size);
    if constexpr (Kind == Retraction::exp) stiefel::retract_exp(q, xi, step, size);
  }
};

}  // namespace mk
