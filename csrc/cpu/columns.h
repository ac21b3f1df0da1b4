// Between row-major matrices in memory and registers with one lane a matrix, element by element where the caller wants.
#pragma once

#include <type_traits>

#include "cpu/transpose.h"

namespace mk {
namespace MK_ISA {
namespace {

// put(i, j, register) for every element of `lanes` matrices rows x columns, one after the other from p.
template <class R, class Put>
MK_FN void read_matrices(const R* p, int rows, int columns, const Put& put) {
  const int E = rows * columns;
  int e = 0, i = 0, j = 0;
  const auto next = [&](Pack<R> x) {
    put(i, j, x);
    if (++j == columns) {
      j = 0;
      i++;
    }
  };
  if constexpr (has_eights && std::is_same<R, float>::value) {
    for (; e + 8 <= E; e += 8) {
      Pack<R> x[8];
      load_eight(p + e, E, x);
      for (int k = 0; k < 8; k++) next(x[k]);
    }
  }
  for (; e < E; e++) {
    R one[Pack<R>::lanes];
    for (int l = 0; l < Pack<R>::lanes; l++) one[l] = p[l * E + e];
    next(Pack<R>::load(one));
  }
}

// The same the other way, from get(i, j).
template <class R, class Get>
MK_FN void write_matrices(R* p, int rows, int columns, const Get& get) {
  const int E = rows * columns;
  int e = 0, i = 0, j = 0;
  const auto next = [&] {
    const Pack<R> x = get(i, j);
    if (++j == columns) {
      j = 0;
      i++;
    }
    return x;
  };
  if constexpr (has_eights && std::is_same<R, float>::value) {
    for (; e + 8 <= E; e += 8) {
      Pack<R> x[8];
      for (int k = 0; k < 8; k++) x[k] = next();
      store_eight(x, p + e, E);
    }
  }
  for (; e < E; e++) {
    R one[Pack<R>::lanes];
    next().store(one);
    for (int l = 0; l < Pack<R>::lanes; l++) p[l * E + e] = one[l];
  }
}

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
