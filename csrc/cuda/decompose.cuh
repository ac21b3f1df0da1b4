// Batches of matrices between device memory, where they lie one after the other, and shared memory.
#pragma once

#include "batch.h"
#include "cuda/arithmetic.cuh"

namespace mk {
namespace cuda {

// f(matrix, row, column, number) for each of the `count` matrices rows x columns from x on, by a team of threads, 16
// bytes at a time where addresses allow.
template <class T, class R, class F>
MK_DEVICE void read_matrices(const R* x, int count, int rows, int columns, const F& f) {
  constexpr int size = Chunk<R>::size;
  const int elements = rows * columns, all = count * elements, wide = is_aligned(x) ? all / size * size : 0;
  for (int e = T::rank() * size; e < wide; e += T::size * size) {
    const Chunk<R> chunk = load_chunk(x + e);
    int matrix = e / elements, row = e % elements / columns, column = e % elements % columns;
    MK_UNROLL
    for (int k = 0; k < size; k++) {
      f(matrix, row, column, chunk.number[k]);
      if (++column < columns) continue;
      column = 0;
      if (++row < rows) continue;
      row = 0;
      matrix++;
    }
  }
  for (int e = wide + T::rank(); e < all; e += T::size)
    f(e / elements, e % elements / columns, e % elements % columns, x[e]);
}

// The same the other way, from f(matrix, row, column).
template <class T, class R, class F>
MK_DEVICE void write_matrices(R* x, int count, int rows, int columns, const F& f) {
  constexpr int size = Chunk<R>::size;
  const int elements = rows * columns, all = count * elements, wide = is_aligned(x) ? all / size * size : 0;
  for (int e = T::rank() * size; e < wide; e += T::size * size) {
    Chunk<R> chunk;
    int matrix = e / elements, row = e % elements / columns, column = e % elements % columns;
    MK_UNROLL
    for (int k = 0; k < size; k++) {
      chunk.number[k] = f(matrix, row, column);
      if (++column < columns) continue;
      column = 0;
      if (++row < rows) continue;
      row = 0;
      matrix++;
    }
    store_chunk(x + e, chunk);
  }
  for (int e = wide + T::rank(); e < all; e += T::size)
    x[e] = f(e / elements, e % elements / columns, e % elements % columns);
}

}  // namespace cuda
}  // namespace mk
