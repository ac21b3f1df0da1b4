// What is stepped along: torch.optim.SGD's momentum ([FG] Eq. 31), elementwise.
#pragma once

#include "lane.h"

namespace mk {

// R is the arithmetic type. The operations and their order are those of torch.optim.SGD, so that Euclidean steps agree
// with it to the bit; weight_decay is 0 where the group's manifold has a fixed norm.
template <class R>
struct Momentum {
  R momentum, one_minus_dampening, weight_decay, divisor;
  bool first, nesterov, plain, buffered;  // plain: the gradient is taken as it is, its divisor is 1

  template <class T>
  MK_FN T gradient(T w, T g) const {
    if (!plain) g = g / T(divisor);
    if (weight_decay != R(0)) g = fma(w, T(weight_decay), g);
    return g;
  }
  // The new buffer; g as gradient() gives it.
  template <class T>
  MK_FN T buffer(T g, T m) const {
    return first ? g : fma(g, T(one_minus_dampening), m * T(momentum));
  }
  // The direction, from the new buffer as it is stored.
  template <class T>
  MK_FN T direction(T g, T m) const {
    if (!buffered) return g;
    return nesterov ? fma(m, T(momentum), g) : m;
  }
  // Whether the direction can be had again without the gradient, once the buffer is stored.
  MK_FN bool buffer_is_direction() const { return buffered && !nesterov; }
};

}  // namespace mk
