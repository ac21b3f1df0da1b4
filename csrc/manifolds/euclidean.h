// R^{n x p}: torch.optim.SGD's last line.
#pragma once

#include "lane.h"

namespace mk::euclidean {

template <class T>
MK_FN T step(T w, T direction, T minus_lr) {
  return fma(direction, minus_lr, w);
}

}  // namespace mk::euclidean
