// [FG] Eq. 5, and Corollary 2 (Eq. 7) with rho = 1, c = 0.
#pragma once

#include "lane.h"

namespace mk {

template <class R>
struct StepSize {
  R lr, rho, curvature;
  bool bounded;  // "general"; otherwise tau = 1

  // lr / tau for a group whose Riemannian gradient has the given square norm. The square root of Eq. 5 is taken factor
  // by factor, tau = max(1, R max(2 rho + R, sqrt(1 + c (rho + R)))), so that R^4 cannot overflow.
  template <class T>
  MK_FN T operator()(T square) const {
    return bounded ? of_norm(root(square)) : T(lr);
  }
  template <class T>
  MK_FN T of_norm(T norm) const {
    if (!bounded) return T(lr);
    T factor = norm + T(R(2) * rho);
    if (curvature != R(0)) factor = max(factor, sqrt(max(T(0), fma(norm + T(rho), T(curvature), T(1)))));
    return over_tau(norm * factor);
  }
  // The same where is_flat(): Corollary 2.
  MK_FN bool is_flat() const { return bounded && curvature == R(0); }
  template <class T>
  MK_FN T flat(T square) const {
    const T norm = root(square);
    return over_tau(norm * (norm + T(R(2) * rho)));
  }

 private:
  template <class T>
  MK_FN T over_tau(T tau) const {
    return T(lr) * reciprocal(max(T(1), tau));
  }
};

}  // namespace mk
