// QR steps of Stiefel matrices too large for a lane each: one matrix at a time, elements of a row in lanes, everything
// by products of matrices.
//
// W + V is orthonormalised by the Cholesky factor of its Gram matrix, which for a tangent V has a condition of at most
// 1 + ||V||^2: one round is as accurate as rotations while that is small, two while rounding leaves the factor
// positive; longer steps take Householder's reflections. The Gram matrix is measured, so that no drift from the
// manifold lasts.
#pragma once

#include "cpu/matrix_alone.h"

namespace mk {
namespace MK_ISA {
namespace {

template <class R>
class Matrices {
  using T = Pack<R>;
  static constexpr int lanes = T::lanes;

  const Job& job;
  const int n, p, rows, columns;  // rows x columns: n x p with padding, of zeros
  const int count;                // of padded elements
  const Momentum<R> momentum;
  const StepSize<double> step_size;
  const R largest_square;  // as in lanes.h
  const Places weight_places, grad_places;
  R *q, *d, *m;      // w/s, direction and then xi, new buffer
  R *A, *S, *pivot;  // columns x columns, and the inverses of a diagonal
  enum Round { none, one, two };

  static int64_t* table_of(void* scratch) { return static_cast<int64_t*>(scratch); }

  void read(void* base, bool grad, int64_t k, R* into) const {
    const Geometry& g = *job.geometry;
    copy_matrix<R, false>(job.storage, base, offset_of(g, grad ? g.grad_stride : g.weight_stride, job.component(k)),
                          grad ? grad_places : weight_places, n, p, into, columns);
  }
  void write(void* base, int64_t k, R* from) const {
    const Geometry& g = *job.geometry;
    copy_matrix<R, true>(job.storage, base, offset_of(g, g.weight_stride, job.component(k)), weight_places, n, p, from,
                         columns);
  }

  // f(element, which of four sums) over registers: sums take turns, so that none waits for its last addition.
  template <class F>
  MK_FN void each(const F& f) const {
    for (int e = 0; e < count; e += 4 * lanes)
      for (int turn = 0; turn < 4; turn++) f(e + turn * lanes, turn);
  }

  // Numbers in rows, of storage type S.
  template <class S>
  struct Rows {
    S* first;
    const int64_t* row;  // null: padded rows
    MK_FN S* operator()(int i, int columns) const { return first + (row ? row[i] : int64_t(i) * columns); }
  };

  // Weight, gradient and old buffer become q, the direction in d and, where that is another, the new buffer in m.
  // Returns the sum of all their squares: where it is in range, nothing overflows.
  template <class S>
  __attribute__((noinline)) R combine(Rows<S> weight, Rows<S> grad, Rows<S> old, R scale) const {
    const R inverse = R(1) / scale;
    const bool remembers = momentum.buffered && !momentum.first, nesterov = momentum.nesterov;
    T sum[2] = {T(R(0)), T(R(0))};
    R rest = R(0);
    for (int i = 0; i < n; i++) {
      const S *w = weight(i, columns), *g = grad(i, columns), *o = remembers ? old(i, columns) : nullptr;
      R *q_row = q + i * columns, *d_row = d + i * columns, *m_row = m + i * columns;
      sweep<R>(p, [&](int64_t j, auto tag) {
        using V = decltype(tag);
        const V x = get_as<V>(w + j), gradient = momentum.gradient(V(R(0)), get_as<V>(g + j));
        V buffer = gradient;
        if (momentum.buffered)
          buffer = as_stored(job.storage, momentum.buffer(gradient, remembers ? get_as<V>(o + j) : V(R(0))));
        if (nesterov) to(m_row + j, buffer);
        to(d_row + j, momentum.direction(gradient, buffer));
        to(q_row + j, x * V(inverse));
        V square = fma(buffer, buffer, x * x);
        if (nesterov) square = fma(gradient, gradient, square);
        if constexpr (std::is_same<V, R>::value) {
          rest = rest + square;
        } else {
          sum[j / lanes % 2] = sum[j / lanes % 2] + square;
        }
      });
    }
    return R(total(sum[0] + sum[1])) + rest;
  }

  // Reads component k and stores its new buffer. False, with nothing stored, where it must be left to the wider type.
  bool load(int64_t k) const {
    const R scale = R(job.scale(k));
    const Geometry& g = *job.geometry;
    const int64_t component = job.component(k);
    const bool buffered = momentum.buffered && !momentum.first;
    R sum;
    if (weight_places.rows_dense && grad_places.rows_dense) {
      const int64_t weight = offset_of(g, g.weight_stride, component), grad = offset_of(g, g.grad_stride, component);
      with_storage<R>(job.storage, [&](auto s) {
        using S = const decltype(s);
        sum = combine<S>({static_cast<S*>(job.weight) + weight, weight_places.row},
                         {static_cast<S*>(job.grad) + grad, grad_places.row},
                         {buffered ? static_cast<S*>(job.momentum) + weight : nullptr, weight_places.row}, scale);
      });
    } else {
      read(job.weight, false, k, q);
      read(const_cast<void*>(job.grad), true, k, d);
      if (buffered) read(job.momentum, false, k, m);
      sum = combine<const R>({q, nullptr}, {d, nullptr}, {m, nullptr}, scale);
    }
    if (!(sum <= largest_square)) return false;
    if (momentum.buffered) write(job.momentum, k, momentum.nesterov ? m : d);
    return true;
  }

  // d becomes xi = d - q sym(q^T d); returns ||xi||^2.
  __attribute__((noinline)) double project() const {
    multiply<T>(transposed(q, columns), d, columns, columns, n,
                [&](int i, int j, T x) { x.store(A + i * columns + j); });
    symmetrise<T>(A, S, columns);
    T square[4];
    for (T& x : square) x = T(R(0));
    multiply<T>(plain(q, columns), S, rows, columns, p, [&](int i, int j, T x) {
      R* at = d + i * columns + j;
      const T xi = T::load(at) - x;
      xi.store(at);
      square[i % 4] = fma(xi, xi, square[i % 4]);
    });
    return total((square[0] + square[1]) + (square[2] + square[3]));
  }

  // Z <- factor Y R^-1, R^T R = Y^T Y. False where Y^T Y has a pivot that no W + V has, and rounding must have made.
  __attribute__((noinline)) bool orthonormalise(const R* Y, R* Z, R factor) const {
    gram<T>(Y, A, n, columns);
    for (int j = p; j < columns; j++) A[j * columns + j] = R(1);
    if (!cholesky<T>(A, pivot, columns, R(0.25))) return false;
    invert_upper<T>(A, pivot, S, columns);
    multiply_upper<T>(plain(Y, columns), S, rows, columns,
                      [&](int i, int j, T x) { (x * T(factor)).store(Z + i * columns + j); });
    return true;
  }

  static Round rounds(double square) {
    if (square <= 9) return one;
    return square <= 1e-3 / double(Limits<R>::epsilon) ? two : none;
  }

  // The weight of component k after a step of lr/tau along xi; q holds w/s. False where the wider type must do it.
  bool retract(int64_t k, double step, double square, const R* xi) const {
    const double scale = job.scale(k), v = step / scale;
    const Round round = rounds(v * v * square);
    if (round == none) return false;
    const T minus = T(R(-v));
    each([&](int e, int) { fma(minus, T::load(xi + e), T::load(q + e)).store(q + e); });
    if (!orthonormalise(q, d, round == one ? R(scale) : R(1))) return false;
    if (round == two && !orthonormalise(d, q, R(scale))) return false;
    write(job.weight, k, round == one ? d : q);
    return true;
  }

  double alone(int64_t k, bool second, const double* step) const {
    return matrix_alone<R>(job, weight_places, grad_places, k, second, step);
  }

 public:
  Matrices(const Job& job, void* scratch)
      : job(job),
        n(int(job.geometry->n)),
        p(int(job.geometry->p)),
        rows(padded(n, padding)),
        columns(padded_columns<T>(p)),
        count(rows * columns),
        momentum(momentum_of<R>(job)),
        step_size(step_size_of<double>(job)),
        largest_square(job.storage == Storage::float16 ? R(largest_float16) * R(largest_float16)
                                                       : Limits<R>::huge_square),
        weight_places(*job.geometry, job.geometry->weight_stride, table_of(scratch)),
        grad_places(*job.geometry, job.geometry->grad_stride, table_of(scratch) + n + p) {
    const uintptr_t numbers = reinterpret_cast<uintptr_t>(table_of(scratch) + 2 * (n + p));
    q = reinterpret_cast<R*>((numbers + 63) / 64 * 64);
    d = q + count;
    m = d + count;
    A = m + count;
    S = A + columns * columns;
    pivot = S + columns * columns;
    if (rows > n || columns > p)
      for (R* x = q; x < A; x++) *x = R(0);
  }

  // Components of their own norm.
  void whole(int64_t begin, int64_t end, Partial* out) const {
    for (int64_t k = begin; k < end; k++) {
      double square;
      if (load(k)) {
        square = project();
        const double step = step_size(square);
        if (!retract(k, step, square, d)) alone(k, true, &step);
      } else {
        square = alone(k, false, nullptr);
      }
      if (square < 0) out->nonfinite++;
      if (job.norms) job.norms[k] = square < 0 ? __builtin_nan("") : __builtin_sqrt(square);
    }
  }

  // Components of a shared norm: xi is kept for the second pass.
  void first(int64_t begin, int64_t end, Partial* out, uint8_t* states, R* kept) const {
    for (int64_t k = begin; k < end; k++) {
      if (load(k)) {
        out->square += project();
        __builtin_memcpy(kept + k * count, d, size_t(count) * sizeof(R));
        continue;
      }
      const double stop = __builtin_nan("");
      const double square = alone(k, false, &stop);
      states[k] = square < 0 ? left_out : in_wider_type;
      if (square < 0) out->nonfinite++;
      if (square >= 0) out->square += square;
    }
  }

  void second(int64_t begin, int64_t end, double step, const uint8_t* states, const R* kept) const {
    for (int64_t k = begin; k < end; k++) {
      if (states[k] == left_out) continue;
      bool done = false;
      if (states[k] != in_wider_type) {
        const R* xi = kept + k * count;
        T square[4];
        for (T& x : square) x = T(R(0));
        each([&](int e, int turn) { square[turn] = fma(T::load(xi + e), T::load(xi + e), square[turn]); });
        read(job.weight, false, k, q);
        const T inverse = T(R(1)) / T(R(job.scale(k)));
        each([&](int e, int) { (T::load(q + e) * inverse).store(q + e); });
        done = retract(k, step, total((square[0] + square[1]) + (square[2] + square[3])), xi);
      }
      if (!done) alone(k, true, &step);
    }
  }
};

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
