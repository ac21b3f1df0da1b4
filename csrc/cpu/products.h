// Products of matrices of any size, blocked for registers: a tile of the result stays in registers while its sum runs.
//
// Matrices lie row after row, `stride` numbers apart; rows and columns are padded to whole tiles, so that nothing here
// has a tail. T is a SIMD register or, for the few matrices that need a wider type, a single number. Sums run over k in
// order: bits depend on the sizes alone.
#pragma once

#include "cpu/pack.h"
#include "cpu/transpose.h"

namespace mk {
namespace MK_ISA {
namespace {

template <class T>
struct Lane {
  static constexpr int count = 1;
  MK_FN static T load(const T* p) { return *p; }
  MK_FN static void store(T* p, T x) { *p = x; }
  MK_FN static T all(T x) { return x; }
};
template <class R>
struct Lane<Pack<R>> {
  static constexpr int count = Pack<R>::lanes;
  MK_FN static Pack<R> load(const R* p) { return Pack<R>::load(p); }
  MK_FN static void store(R* p, Pack<R> x) { x.store(p); }
  // x - 0 is x, which the compiler knows; x + 0 is not where x is -0.
  MK_FN static Pack<R> all(R x) { return Pack<R>(x - typename Pack<R>::Numbers{}); }
};

// Two registers a row: with sixteen registers four rows, with thirty-two eight.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int tile_rows = 8;
#else
constexpr int tile_rows = 4;
#endif
constexpr int padding = 8;  // rows, and columns where a register has fewer lanes

constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a < b ? b : a; }
constexpr int padded(int size, int to) { return (size + to - 1) / to * to; }
template <class T>
constexpr int padded_columns(int size) {
  return padded(size, Lane<T>::count > padding ? Lane<T>::count : padding);
}

// The left factor: element (i, k) at i * row + k * step, so that a transposed matrix is one, too.
template <class R>
struct Left {
  const R* at;
  int64_t row, step;
};
template <class R>
MK_FN Left<R> plain(const R* at, int64_t stride) {
  return {at, stride, 1};
}
template <class R>
MK_FN Left<R> transposed(const R* at, int64_t stride) {
  return {at, 1, stride};
}

// One tile: f(row, column register, sum over [from, to[column]) of a(row, k) b(k, column)); to does not decrease.
template <int Columns, class T, class F>
MK_FN void tile(Left<Real<T>> a, const Real<T>* b, int64_t stride, int from, const int* to, const F& f) {
  using L = Lane<T>;
  T sum[tile_rows][Columns];
  for (auto& row : sum)
    for (T& x : row) x = T(Real<T>(0));
  const Real<T>* left = a.at + from * a.step;
  const Real<T>* right = b + from * stride;
  int k = from;
  for (; k < to[0]; k++, left += a.step, right += stride) {
    T y[Columns];
#pragma GCC unroll 2
    for (int c = 0; c < Columns; c++) y[c] = L::load(right + c * L::count);
#pragma GCC unroll 8
    for (int r = 0; r < tile_rows; r++) {
      const T x = L::all(left[r * a.row]);
#pragma GCC unroll 2
      for (int c = 0; c < Columns; c++) sum[r][c] = fma(x, y[c], sum[r][c]);
    }
  }
  for (; k < to[Columns - 1]; k++, left += a.step, right += stride) {
    const T y = L::load(right + (Columns - 1) * L::count);
#pragma GCC unroll 8
    for (int r = 0; r < tile_rows; r++) sum[r][Columns - 1] = fma(L::all(left[r * a.row]), y, sum[r][Columns - 1]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < tile_rows; r++) {
#pragma GCC unroll 2
    for (int c = 0; c < Columns; c++) f(r, c, sum[r][c]);
  }
}

// Where the register of column i begins.
template <class T>
MK_FN int register_of(int i) {
  return i / Lane<T>::count * Lane<T>::count;
}

// The columns [first, columns) of tile_rows rows of A B: f(row, column, sum over [from, to(end of the register))).
template <class T, class To, class F>
MK_FN void row_of_tiles(Left<Real<T>> a, const Real<T>* b, int64_t stride, int first, int columns, int from,
                        const To& to, const F& f) {
  constexpr int lanes = Lane<T>::count;
  int j = first;
  for (; j + 2 * lanes <= columns; j += 2 * lanes) {
    const int ends[] = {to(j + lanes), to(j + 2 * lanes)};
    tile<2, T>(a, b + j, stride, from, ends, [&](int r, int c, T x) { f(r, j + c * lanes, x); });
  }
  for (; j < columns; j += lanes) {
    const int end = to(j + lanes);
    tile<1, T>(a, b + j, stride, from, &end, [&](int r, int, T x) { f(r, j, x); });
  }
}

// f(i, j, (A B)_ij) for the rows of B's columns [first, end) that `rows` tells for the end of a register. The columns
// of a tile are the outer loop: what is read again and again of B stays in a cache.
template <class T, class Rows, class To, class F>
MK_FN void columns_of_tiles(Left<Real<T>> a, const Real<T>* b, int64_t stride, int first, int end, const Rows& rows,
                            const To& to, const F& f) {
  constexpr int lanes = Lane<T>::count;
  for (int j = first; j < end; j += 2 * lanes) {
    const int next = j + lanes < end ? j + lanes : j, last = next + lanes;  // the second register, or the only one
    const int ends[] = {to(next), to(last)};
    int i = 0;
    if (next > j)
      for (; i < rows(next); i += tile_rows)
        tile<2, T>({a.at + i * a.row, a.row, a.step}, b + j, stride, 0, ends,
                   [&](int r, int c, T x) { f(i + r, j + c * lanes, x); });
    for (; i < rows(last); i += tile_rows)
      tile<1, T>({a.at + i * a.row, a.row, a.step}, b + next, stride, 0, ends + 1,
                 [&](int r, int, T x) { f(i + r, next, x); });
  }
}

// Columns [first, end) of a matrix whose rows are `stride` numbers apart: products are computed by columns, so that
// threads can share one.
struct Columns {
  int first, end;
  int64_t stride;
};

// f(i, j, (A B)_ij) over a padded result, B of `depth` rows.
template <class T, class F>
MK_FN void multiply(Left<Real<T>> a, const Real<T>* b, int rows, Columns columns, int depth, const F& f) {
  columns_of_tiles<T>(
      a, b, columns.stride, columns.first, columns.end, [=](int) { return rows; }, [=](int) { return depth; }, f);
}

// The same for an upper triangular B of `order` rows.
template <class T, class F>
MK_FN void multiply_upper(Left<Real<T>> a, const Real<T>* b, int rows, Columns columns, int order, const F& f) {
  columns_of_tiles<T>(
      a, b, columns.stride, columns.first, columns.end, [=](int) { return rows; },
      [=](int end) { return smaller(end, order); }, f);
}

// G = Y^T Y for Y of `rows` rows, `order` rows of it, in the registers that the diagonal crosses and those right of it.
template <class T>
MK_FN void gram(const Real<T>* Y, Real<T>* G, int rows, Columns columns, int order) {
  const int64_t stride = columns.stride;
  columns_of_tiles<T>(
      transposed(Y, stride), Y, stride, columns.first, columns.end, [=](int end) { return smaller(end, order); },
      [=](int) { return rows; }, [&](int i, int j, T x) { Lane<T>::store(G + i * stride + j, x); });
}

// G <- R, upper triangular with R^T R = G (order x order, with padding on the right), and `inverse` the inverses of its
// diagonal. False where a pivot is below `least`. What is left of the diagonal is not to be read.
template <class T>
MK_FN bool cholesky(Real<T>* G, Real<T>* inverse, int order, int columns, Real<T> least) {
  const int64_t stride = columns;
  using R = Real<T>;
  using L = Lane<T>;
  bool sound = true;
  for (int i = 0; i < order; i += tile_rows) {
    const int first = register_of<T>(i);
    if (i > 0)
      row_of_tiles<T>(
          transposed(G + i, stride), G, stride, first, columns, 0, [=](int) { return i; },
          [&](int r, int j, T x) {
            R* at = G + (i + r) * stride + j;
            L::store(at, L::load(at) - x);
          });
    for (int r = i; r < i + tile_rows; r++) {
      R* row = G + r * stride;
      const R pivot = row[r];
      sound = sound && pivot >= least;
      const R scale = inverse[r] = R(1) / sqrt(max(pivot, least));
      for (int j = first; j < columns; j += L::count) L::store(row + j, L::load(row + j) * L::all(scale));
      for (int below = r + 1; below < i + tile_rows; below++) {
        const T factor = L::all(-row[below]);
        R* other = G + below * stride;
        for (int j = first; j < columns; j += L::count)
          L::store(other + j, fma(factor, L::load(row + j), L::load(other + j)));
      }
    }
  }
  return sound;
}

// Columns of X = R^-1 for an upper triangular R with the inverses of its diagonal, from the register that the diagonal
// crosses upwards; `columns` begins and ends between tiles.
template <class T>
MK_FN void invert_upper(const Real<T>* R, const Real<T>* inverse, Real<T>* X, Columns columns, int order) {
  using L = Lane<T>;
  const int64_t stride = columns.stride;
  const int end = columns.end;
  for (int i = smaller(end, order) - tile_rows; i >= 0; i -= tile_rows) {
    const int first = larger(columns.first, register_of<T>(i)), next = i + tile_rows;
    Real<T>* block = X + i * stride;
    for (int r = 0; r < tile_rows; r++)
      for (int j = first; j < end; j++) block[r * stride + j] = Real<T>(j == i + r);
    row_of_tiles<T>(
        plain(R + i * stride, stride), X, stride, first, end, next,
        [=](int to) { return larger(smaller(to, order), next); },
        [&](int r, int j, T x) {
          Real<T>* at = block + r * stride + j;
          L::store(at, L::load(at) - x);
        });
    for (int j = first; j < end; j += L::count) {
      T x[tile_rows];
#pragma GCC unroll 8
      for (int r = tile_rows - 1; r >= 0; r--) {
        x[r] = L::load(block + r * stride + j);
#pragma GCC unroll 8
        for (int k = tile_rows - 1; k > r; k--) x[r] = fma(L::all(-R[(i + r) * stride + i + k]), x[k], x[r]);
        x[r] = x[r] * L::all(inverse[i + r]);
        L::store(block + r * stride + j, x[r]);
      }
    }
  }
}

// Eight columns of as many rows as a register has lanes: x[e] is column e.
template <class T>
MK_FN void columns_of(const Real<T>* at, int64_t stride, T* x) {
  if constexpr (has_eights && std::is_same<T, Pack<float>>::value) {
    load_eight(at, int(stride), x);
  } else {
    Real<T> column[Lane<T>::count];
    for (int e = 0; e < padding; e++) {
      for (int l = 0; l < Lane<T>::count; l++) column[l] = at[l * stride + e];
      x[e] = Lane<T>::load(column);
    }
  }
}

// And back: row l gets the lanes l.
template <class T>
MK_FN void to_columns(const T* x, Real<T>* at, int64_t stride) {
  if constexpr (has_eights && std::is_same<T, Pack<float>>::value) {
    store_eight(x, at, int(stride));
  } else {
    Real<T> column[Lane<T>::count];
    for (int e = 0; e < padding; e++) {
      Lane<T>::store(column, x[e]);
      for (int l = 0; l < Lane<T>::count; l++) at[l * stride + e] = column[l];
    }
  }
}

// Columns of S = (A + A^T) / 2, of `order` rows.
template <class T>
MK_FN void symmetrise(const Real<T>* A, Real<T>* S, Columns columns, int order) {
  using L = Lane<T>;
  const int64_t stride = columns.stride;
  const T half = T(Real<T>(0.5));
  for (int j = columns.first; j < columns.end; j += L::count) {
    for (int i = 0; i < order; i += padding) {
      T x[padding];
      columns_of<T>(A + j * stride + i, stride, x);
      for (int r = 0; r < padding; r++)
        L::store(S + (i + r) * stride + j, half * (L::load(A + (i + r) * stride + j) + x[r]));
    }
  }
}

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
