// G(1, n), unit vectors up to sign: the steps of SGD-G and Adam-G (Cho & Lee 2017). h = g - w <w, g> is sphere::rgrad.
#pragma once

#include "lane.h"
#include "linalg/sine.h"

namespace mk::grassmann {

// Factor that clips a vector of the given norm to nu; a zero vector keeps its length.
template <class R>
MK_FN R clip(R norm, R nu) {
  return norm > nu ? nu / norm : R(1);
}

// The geodesic from w along d = factor c, with c (of the given norm) carried along it: with angle = ||d||,
//   w <- w cos + c factor sinc,  c <- c cos - w turn,  turn = sign(factor) ||c|| sin.
template <class R>
struct Geodesic {
  R cosine, along, turn;
  MK_FN Geodesic(R norm, R factor) {
    const R angle = abs(factor) * norm;
    const SineCosine<R> at = sine_cosine(angle);
    cosine = at.cosine;
    along = factor * (angle > R(0) ? at.sine / angle : R(1));
    turn = (factor < R(0) ? -norm : norm) * at.sine;
  }
};

}  // namespace mk::grassmann
