// G(1, n), unit vectors up to sign: the steps of SGD-G and Adam-G (Cho & Lee 2017). h = g - w <w, g> is sphere::rgrad.
#pragma once

#include "lane.h"

namespace mk::grassmann {

// Factor that clips a vector of the given norm to nu; a zero vector keeps its length.
template <class R>
MK_FN R clip(R norm, R nu) {
  return norm > nu ? nu / norm : R(1);
}

// The geodesic from w along d, and what is parallel to d carried along it: with angle = ||d||,
//   w <- w cos + d sinc,  d <- d cos - w angle sin.
template <class R>
struct Geodesic {
  R cosine, sinc, angle_sine;
  explicit Geodesic(R angle)
      : cosine(cos(angle)), sinc(angle > R(0) ? sin(angle) / angle : R(1)), angle_sine(angle * sin(angle)) {}
};

}  // namespace mk::grassmann
