// QR steps of Stiefel matrices too large for a lane each: one matrix at a time, elements of a row in lanes, everything
// by products of matrices.
//
// W + V is orthonormalised by the Cholesky factor of its Gram matrix, which for a tangent V has a condition of at most
// 1 + ||V||^2: one round is as accurate as rotations while that is small, two while rounding leaves the factor
// positive; longer steps take Householder's reflections. The Gram matrix is measured, so that no drift from the
// manifold lasts.
//
// A team of threads shares a matrix by columns of its products and by rows of its copies; every number is computed in
// the same order whoever has it.
#pragma once

#include "cpu/matrix_alone.h"

namespace mk {
namespace MK_ISA {
namespace {

template <class R>
class Matrices {
  using T = Pack<R>;
  static constexpr int lanes = T::lanes;
  static constexpr int panel = 32;           // columns that a thread takes at a time
  static constexpr int block = 8 * padding;  // rows with a sum of their own

  const Job& job;
  const Team team;
  const int n, p, rows, order;  // rows x columns: n x p with padding, of zeros; order x columns: p x p
  const int64_t columns;
  const int64_t count;  // of padded elements
  const Momentum<R> momentum;
  const StepSize<double> step_size;
  const R largest_square;  // as in lanes.h
  const Places weight_places, grad_places;
  R *q, *d, *m;      // w/s, direction and then xi, buffer
  R *A, *S, *pivot;  // columns x columns, and the inverses of a diagonal
  R* sums;           // of blocks of rows or panels of columns

  static int64_t* table_of(void* scratch) { return static_cast<int64_t*>(scratch); }
  int64_t offset(const int64_t* stride, int64_t k) const { return offset_of(*job.geometry, stride, job.component(k)); }

  // f(piece) for every thread of the team.
  template <class F>
  void together(const F& f) const {
    if (team.size == 1) return f(0);
    team.run(team.size, [](const void* context, int piece) { (*static_cast<const F*>(context))(piece); }, &f);
  }
  // f(columns, which) over panels, in turn, so that the work of triangular products is shared evenly.
  template <class F>
  void by_columns(const F& f) const {
    const int width = int(columns);
    together([&](int piece) {
      for (int i = piece; i * panel < width; i += team.size)
        f(Columns{i * panel, smaller(width, (i + 1) * panel), columns}, i);
    });
  }
  // f(first, end, which) over blocks of rows.
  template <class F>
  void by_rows(const F& f) const {
    together([&](int piece) {
      for (int i = piece; i * block < n; i += team.size) f(i * block, smaller(n, (i + 1) * block), i);
    });
  }
  // The sums of all blocks or panels in their order.
  double total_of_sums(int size, int width) const {
    double sum = 0;
    for (int i = 0; i * width < size; i++) sum += double(sums[i]);
    return sum;
  }

  void write(void* base, int64_t k, R* from, int first, int end) const {
    copy_matrix<R, true>(job.storage, base, offset(job.geometry->weight_stride, k), weight_places, first, end, p, from,
                         columns);
  }
  void write(void* base, int64_t k, R* from) const {
    by_rows([&](int first, int end, int) { write(base, k, from, first, end); });
  }

  // Numbers in rows, of storage type S.
  template <class S>
  struct Rows {
    S* first;
    const int64_t* row;  // null: padded rows
    MK_FN S* operator()(int i, int64_t columns) const { return first + (row ? row[i] : i * columns); }
  };

  // Rows [from, end) of weight, gradient and old buffer become q, the direction in d and, where that is another, the
  // new buffer in m. Returns the sum of all their squares: where it is in range, nothing overflows.
  template <class S>
  __attribute__((noinline)) R combine(Rows<S> weight, Rows<S> grad, Rows<S> old, R scale, int from, int end) const {
    const R inverse = R(1) / scale;
    const bool remembers = momentum.buffered && !momentum.first, nesterov = momentum.nesterov;
    T sum[2] = {T(R(0)), T(R(0))};
    R rest = R(0);
    for (int i = from; i < end; i++) {
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
    const int64_t weight = offset(job.geometry->weight_stride, k), grad = offset(job.geometry->grad_stride, k);
    const bool old = momentum.buffered && !momentum.first;
    by_rows([&](int from, int end, int i) {
      if (weight_places.rows_dense && grad_places.rows_dense) {
        with_storage<R>(job.storage, [&](auto s) {
          using S = const decltype(s);
          sums[i] =
              combine<S>({static_cast<S*>(job.weight) + weight, weight_places.row},
                         {static_cast<S*>(job.grad) + grad, grad_places.row},
                         {old ? static_cast<S*>(job.momentum) + weight : nullptr, weight_places.row}, scale, from, end);
        });
        return;
      }
      const auto read = [&](void* base, int64_t start, const Places& places, R* into) {
        copy_matrix<R, false>(job.storage, base, start, places, from, end, p, into, columns);
      };
      read(job.weight, weight, weight_places, q);
      read(const_cast<void*>(job.grad), grad, grad_places, d);
      if (old) read(job.momentum, weight, weight_places, m);
      sums[i] = combine<const R>({q, nullptr}, {d, nullptr}, {m, nullptr}, scale, from, end);
    });
    // Single sums may be infinite.
    if (!(total_of_sums(n, block) <= double(largest_square))) return false;
    if (momentum.buffered) write(job.momentum, k, momentum.nesterov ? m : d);
    return true;
  }

  // d becomes xi = d - q sym(q^T d); returns ||xi||^2.
  double project() const {
    by_columns([&](Columns part, int) {
      multiply<T>(transposed(q, columns), d, order, part, n, [&](int i, int j, T x) { x.store(A + i * columns + j); });
    });
    by_columns([&](Columns part, int) { symmetrise<T>(A, S, part, order); });
    by_columns([&](Columns part, int which) {
      T square[4];
      for (T& x : square) x = T(R(0));
      multiply<T>(plain(q, columns), S, rows, part, p, [&](int i, int j, T x) {
        R* at = d + i * columns + j;
        const T xi = T::load(at) - x;
        xi.store(at);
        square[i % 4] = fma(xi, xi, square[i % 4]);
      });
      sums[which] = R(total((square[0] + square[1]) + (square[2] + square[3])));
    });
    return total_of_sums(int(columns), panel);
  }

  // Z <- factor Y R^-1, R^T R = Y^T Y. False where Y^T Y has a pivot that no W + V has, and rounding must have made.
  bool orthonormalise(const R* Y, R* Z, R factor) const {
    by_columns([&](Columns part, int) { gram<T>(Y, A, n, part, order); });
    for (int j = p; j < order; j++) A[j * columns + j] = R(1);
    if (!cholesky<T>(A, pivot, order, int(columns), R(0.25))) return false;
    by_columns([&](Columns part, int) {
      invert_upper<T>(A, pivot, S, part, order);
      multiply_upper<T>(plain(Y, columns), S, rows, part, order,
                        [&](int i, int j, T x) { (x * T(factor)).store(Z + i * columns + j); });
    });
    return true;
  }

  // The weight of component k after a step of lr/tau along xi; q holds w/s. False where the wider type must do it.
  bool retract(int64_t k, double step, double square, const R* xi) const {
    const double scale = job.scale(k), v = step / scale, length = v * v * square;
    const bool twice = !(length <= 9);
    if (!(length <= 1e-3 / double(Limits<R>::epsilon))) return false;
    const T minus = T(R(-v));
    by_rows([&](int first, int end, int) {
      for (int64_t e = first * columns; e < end * columns; e += lanes)
        fma(minus, T::load(xi + e), T::load(q + e)).store(q + e);
    });
    if (!orthonormalise(q, d, twice ? R(1) : R(scale))) return false;
    if (twice && !orthonormalise(d, q, R(scale))) return false;
    write(job.weight, k, twice ? q : d);
    return true;
  }

  double alone(int64_t k, bool second, const double* step) const {
    return matrix_alone<R>(job, weight_places, grad_places, k, second, step);
  }
  int64_t kept_size() const { return kept_matrix(n, p); }

 public:
  Matrices(const Job& job, Team team, void* scratch)
      : job(job),
        team(team),
        n(int(job.geometry->n)),
        p(int(job.geometry->p)),
        rows(padded(n, padding)),
        order(padded(p, padding)),
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
    sums = pivot + columns;
    if (rows > n || columns > p)
      for (R* x = q; x < S; x++) *x = R(0);
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
      // R of a group without a finite component is zero.
      if (job.norms) job.norms[k] = square >= 0 ? __builtin_sqrt(square) : job.individual ? __builtin_nan("") : 0;
    }
  }

  // Components of a shared norm: xi and its square norm are kept for the second pass.
  void first(int64_t begin, int64_t end, Partial* out, uint8_t* states, R* kept) const {
    for (int64_t k = begin; k < end; k++) {
      if (load(k)) {
        const double square = project();
        out->square += square;
        R* xi = kept + k * kept_size();
        by_rows([&](int from, int to, int) {
          __builtin_memcpy(xi + from * columns, d + from * columns, size_t((to - from) * columns) * sizeof(R));
        });
        xi[count] = R(square);
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
        const R *xi = kept + k * kept_size(), inverse = R(1) / R(job.scale(k));
        const int64_t weight = offset(job.geometry->weight_stride, k);
        by_rows([&](int from, int to, int) {
          copy_matrix<R, false>(job.storage, job.weight, weight, weight_places, from, to, p, q, columns);
          for (int64_t e = from * columns; e < to * columns; e += lanes) (T::load(q + e) * T(inverse)).store(q + e);
        });
        done = retract(k, step, double(xi[count]), xi);
      }
      if (!done) alone(k, true, &step);
    }
  }
};

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
