// Manifolds with a retraction, in the one form that kernels for small matrices call, here and in csrc/cuda. Every
// function is inlined wherever it is called, whatever the instruction set.
#pragma once

#include "cpu/job.h"
#include "manifolds/oblique.h"
#include "manifolds/sphere.h"
#include "manifolds/stiefel.h"

namespace mk {

// A manifold with a retraction: project(q, m, xi, size) -> ||xi||^2 and q <- R_q(step xi), at unit scale.
template <bool Exp>
struct SphereMap {
  template <class T, class Size>
  MK_FN static T project(const T* q, const T* m, T* xi, Size size) {
    return sphere::project(q, m, xi, size.n * size.p, 1);
  }
  template <class T, class Size>
  MK_FN static void retract(T* q, const T* xi, T step, T square, Size size) {
    sphere::retract(q, xi, Exp ? sphere::exp(step, square) : sphere::projection(step), size.n * size.p, 1);
  }
};

template <bool Exp>
struct ObliqueMap {
  template <class T, class Size>
  MK_FN static T project(const T* q, const T* m, T* xi, Size size) {
    return oblique::project(q, m, xi, size);
  }
  template <class T, class Size>
  MK_FN static void retract(T* q, const T* xi, T step, T, Size size) {
    oblique::retract<Exp>(q, xi, step, size);
  }
};

template <Retraction Kind>
struct StiefelMap {
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
