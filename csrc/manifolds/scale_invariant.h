// The PSI quotient of nonzero vectors w ~ a w ([PSI] Eq. 9-11): Riemannian gradient ||w||^2 g, retraction w + v.
#pragma once

#include "lane.h"

namespace mk::scale_invariant {

// u <- rho u - lr ||w||^2 g
template <class T>
MK_FN T velocity(T u, T g, T rho, T minus_lr_square) {
  return fma(g, minus_lr_square, u * rho);
}

// w <- keep w + u, keep = 1 - min(lr decay ||w||^2, 1/2)
template <class T>
MK_FN T step(T w, T u, T keep) {
  return fma(w, keep, u);
}
template <class R>
MK_FN R keep(R lr_decay_square) {
  return R(1) - min(lr_decay_square, R(0.5));
}

}  // namespace mk::scale_invariant
