// Steps of small matrices, one matrix a lane.
//
// A block is as many components as a register has lanes. Momentum needs no matrix structure: it is updated in memory order,
// and only W and the direction are brought into lanes, only W back. A lane whose squares leave the range of the arithmetic
// type is taken out of the block and computed by the same mathematics in the next wider type (`alone`).
#pragma once

#include "cpu/job.h"
#include "cpu/job_rules.h"
#include "cpu/pass.h"
#include "cpu/storage.h"
#include "cpu/transpose.h"
#include "manifolds/oblique.h"
#include "manifolds/sphere.h"
#include "manifolds/stiefel.h"

namespace mk {
namespace MK_ISA {
namespace {

// A manifold with a retraction: project(q, m, xi, size) -> ||xi||^2 and q <- R_q(step xi), at unit scale.
template <bool Exp>
struct SphereMap {
  template <class T, class Size>
  MK_FN static T project(const T* q, const T* m, T* xi, Size size) {
    return sphere::project(q, m, xi, size.n * size.p, 1);
  }
  template <class T, class Size>
  MK_FN static void retract(T* q, const T* xi, T step, T square, Size size) {
    sphere::retract(q, xi, Exp ? sphere::exp(step, square) : sphere::projection(step), size.n * size.p, 1);
  }
};

template <bool Exp>
struct ObliqueMap {
  template <class T, class Size>
  MK_FN static T project(const T* q, const T* m, T* xi, Size size) {
    return oblique::project(q, m, xi, size);
  }
  template <class T, class Size>
  MK_FN static void retract(T* q, const T* xi, T step, T, Size size) {
    oblique::retract<Exp>(q, xi, step, size);
  }
};

template <Retraction Kind>
struct StiefelMap {
  template <class T, class Size>
  MK_FN static T project(const T* q, const T* m, T* xi, Size size) {
    return stiefel::project(q, m, xi, size);
  }
  template <class T, class Size>
  MK_FN static void retract(T* q, const T* xi, T step, T, Size size) {
    if constexpr (Kind == Retraction::qr) stiefel::retract_qr(q, xi, step, size);
    if constexpr (Kind == Retraction::polar) stiefel::retract_polar(q, xi, step, size);
    if constexpr (Kind == Retraction::cayley) stiefel::retract_cayley(q, xi, step, size);
    if constexpr (Kind == Retraction::exp) stiefel::retract_exp(q, xi, step, size);
  }
};

enum class Order { in_memory, in_lanes, staged };

template <class R>
struct Block {
  static constexpr int N = Pack<R>::lanes;
  int64_t k;  // first component of the block, counted in the job
  int used;
  Order weight_order, grad_order;
  int64_t weight[N], grad[N];
  Mask<R> good;
};

// The components [k, end) of a job, at most a register full.
template <class R>
__attribute__((noinline)) void find_block(const Job& job, int64_t k, int64_t end, Block<R>& b) {
  constexpr int N = Block<R>::N;
  const Geometry& geometry = *job.geometry;
  const int64_t E = geometry.elements();
  b.k = k;
  b.used = end - k < N ? int(end - k) : N;
  const int inner = geometry.batch_dims - 1;
  const int64_t first = job.component(k);
  const bool run = !job.listed && b.used == N && inner >= 0 && first % geometry.size[inner] + N <= geometry.size[inner];
  const int64_t weight_step = run ? geometry.weight_stride[inner] : 0, grad_step = run ? geometry.grad_stride[inner] : 0;
  if (run) {
    b.weight[0] = offset_of(geometry, geometry.weight_stride, first);
    b.grad[0] = offset_of(geometry, geometry.grad_stride, first);
    for (int l = 1; l < N; l++) {
      b.weight[l] = b.weight[0] + l * weight_step;
      b.grad[l] = b.grad[0] + l * grad_step;
    }
  } else {
    for (int l = 0; l < b.used; l++) {
      const int64_t component = job.component(k + l);
      b.weight[l] = offset_of(geometry, geometry.weight_stride, component);
      b.grad[l] = offset_of(geometry, geometry.grad_stride, component);
    }
  }
  if (run && weight_step == 1 && grad_step == 1) {
    b.weight_order = b.grad_order = Order::in_lanes;
  } else {
    b.weight_order = run && weight_step == E && job.weight_in_order ? Order::in_memory : Order::staged;
    b.grad_order = run && grad_step == E && job.grad_in_order ? Order::in_memory : Order::staged;
  }
}

// E registers of a block's elements: one row a lane element (in_lanes), or N matrices one after the other.
template <class R, int Capacity>
__attribute__((noinline)) void read_any(const Job& job, const void* base, Order order, const int64_t* lane,
                                        const int64_t* element, int used, int E, Pack<R>* rows) {
  constexpr int N = Block<R>::N;
  with_storage<R>(job.storage, [&](auto s) {
    using S = decltype(s);
    const S* memory = static_cast<const S*>(base);
    if (order == Order::in_lanes) {
      for (int e = 0; e < E; e++) rows[e] = load(memory + lane[0] + element[e]);
    } else if (order == Order::in_memory) {
      for (int e = 0; e < E; e++) rows[e] = load(memory + lane[0] + int64_t(e) * N);
    } else {
      S stage[Capacity * N];
      for (int l = 0; l < used; l++)
        for (int e = 0; e < E; e++) stage[l * E + e] = memory[lane[l] + element[e]];
      for (int i = used * E; i < N * E; i++) put(stage + i, R(0));
      for (int e = 0; e < E; e++) rows[e] = load(stage + int64_t(e) * N);
    }
  });
}

// The good lanes of a block back to memory; rows in the order that they were read in.
template <class R, int Capacity>
__attribute__((noinline)) void write_any(const Job& job, void* base, const Block<R>& b, bool all_good, int E,
                                         const Pack<R>* rows) {
  constexpr int N = Block<R>::N;
  with_storage<R>(job.storage, [&](auto s) {
    using S = decltype(s);
    S* memory = static_cast<S*>(base);
    if (all_good && b.weight_order == Order::in_lanes) {
      for (int e = 0; e < E; e++) store(memory + b.weight[0] + job.weight_offset[e], rows[e]);
    } else if (all_good && b.weight_order == Order::in_memory) {
      for (int e = 0; e < E; e++) store(memory + b.weight[0] + int64_t(e) * N, rows[e]);
    } else {
      S stage[Capacity * N];
      for (int e = 0; e < E; e++) store(stage + int64_t(e) * N, rows[e]);
      const bool in_lanes = b.weight_order == Order::in_lanes;
      for (int l = 0; l < b.used; l++) {
        if (!b.good.v[l]) continue;
        for (int e = 0; e < E; e++)
          memory[b.weight[l] + job.weight_offset[e]] = in_lanes ? stage[e * N + l] : stage[l * E + e];
      }
    }
  });
}

// One component in the next wider type. `second`: the buffer is stored already. `step`: lr/tau, or null to take it from
// the component's own norm, or NaN to stop after the momentum. Returns ||xi||^2, or -1 where the component is left as it is.
template <class R, class Map>
__attribute__((noinline)) double alone(const Job& job, int64_t k, bool second, const double* step) {
  using Wide = typename StorageTraits<R>::Wide;
  const Dynamic size{int(job.geometry->n), int(job.geometry->p)};
  const int E = size.n * size.p;
  const Momentum<R> momentum = momentum_of<R>(job);
  const Momentum<Wide> wide = momentum_of<Wide>(job);
  const int64_t weight = offset_of(*job.geometry, job.geometry->weight_stride, job.component(k));
  const int64_t grad = offset_of(*job.geometry, job.geometry->grad_stride, job.component(k));
  const Wide scale = Wide(job.scale(k));
  Wide q[Dynamic::capacity], d[Dynamic::capacity], xi[Dynamic::capacity];
  R buffer[Dynamic::capacity];
  for (int e = 0; e < E; e++) {
    const R gradient = momentum.gradient(R(0), get<R>(job.storage, job.grad, grad + job.grad_offset[e]));
    R stored = gradient;
    if (momentum.buffered) {
      const R old = second || !momentum.first ? get<R>(job.storage, job.momentum, weight + job.weight_offset[e]) : R(0);
      stored = buffer[e] = second ? old : as_stored(job.storage, momentum.buffer(gradient, old));
    }
    if (!(abs(gradient) <= StorageTraits<R>::largest) || !(abs(stored) <= StorageTraits<R>::largest)) return -1;
    d[e] = wide.direction(Wide(gradient), Wide(stored));
    q[e] = Wide(get<R>(job.storage, job.weight, weight + job.weight_offset[e])) / scale;
  }
  const Wide square = Map::project(q, d, xi, size);
  if (momentum.buffered && !second)
    for (int e = 0; e < E; e++) set(job.storage, job.momentum, weight + job.weight_offset[e], buffer[e]);
  const Wide length = step ? Wide(*step) : step_size_of<Wide>(job)(square);
  if (length == length) {
    Map::retract(q, xi, -length / scale, square, size);
    for (int e = 0; e < E; e++) set(job.storage, job.weight, weight + job.weight_offset[e], R(q[e] * scale));
  }
  return double(square);
}

// R is the arithmetic type. 16-bit storage is a branch where a block is read or written, not another body.
template <class R, class Map, class Size>
class Lanes {
  using T = Pack<R>;
  static constexpr int N = T::lanes;

  const Job& job;
  const Size size;
  const int E;
  const Momentum<R> momentum;
  const StepSize<R> step_size;
  const bool native;  // storage is R itself
  // Squares of directions up to here take the fast path: nothing overflows, and what is stored in 16 bits stays finite.
  const R largest_square;

  // The commonest case in line, the others out of line.
  MK_FN void read(const void* base, Order order, const int64_t* lane, const int64_t* element, int used, T* rows) const {
    if (native && order == Order::in_memory) {
      const R* memory = static_cast<const R*>(base) + lane[0];
      for (int e = 0; e < E; e++) rows[e] = load(memory + int64_t(e) * N);
    } else {
      read_any<R, Size::capacity>(job, base, order, lane, element, used, E, rows);
    }
  }
  MK_FN void write(void* base, const Block<R>& b, bool all_good, const T* rows) const {
    if (native && all_good && b.weight_order == Order::in_memory) {
      R* memory = static_cast<R*>(base) + b.weight[0];
      for (int e = 0; e < E; e++) store(memory + int64_t(e) * N, rows[e]);
    } else {
      write_any<R, Size::capacity>(job, base, b, all_good, E, rows);
    }
  }

  MK_FN T scale_of(const Block<R>& b) const {
    if (!job.scale_stride) return T(job.scales[0]);
    R scale[N];
    for (int l = 0; l < N; l++) scale[l] = R(job.scale(b.k + (l < b.used ? l : 0)));
    return T::load(scale);
  }

  MK_FN void bring(const T* rows, Order order, T* x) const {
    if (order == Order::in_lanes) {
      for (int e = 0; e < E; e++) x[e] = rows[e];
    } else {
      to_lanes(rows, x, size);
    }
  }

  // Reads what the step needs into lanes: q = w/s and the direction d. The first pass stores nothing yet: new buffers are
  // left in `buffer` in memory order.
  MK_FN void direction(const Block<R>& b, bool second, T scale, T* q, T* d, T* buffer) const {
    T rows[Size::capacity];
    const Order order = b.weight_order;
    if (!second || !momentum.buffer_is_direction()) {
      read(job.grad, b.grad_order, b.grad, job.grad_offset, b.used, rows);
      for (int e = 0; e < E; e++) rows[e] = momentum.gradient(T(R(0)), rows[e]);
    }
    if (momentum.buffered) {
      if (second || !momentum.first) read(job.momentum, order, b.weight, job.weight_offset, b.used, buffer);
      for (int e = 0; e < E; e++) {
        if (!second) buffer[e] = as_stored(job.storage, momentum.buffer(rows[e], buffer[e]));
        rows[e] = momentum.direction(rows[e], buffer[e]);
      }
    }
    bring(rows, order, d);
    read(job.weight, order, b.weight, job.weight_offset, b.used, rows);
    bring(rows, order, q);
    const T inverse = T(R(1)) / scale;
    for (int e = 0; e < E; e++) q[e] = q[e] * inverse;
  }

  MK_FN void write_weight(const Block<R>& b, bool all_good, T scale, T* q) const {
    for (int e = 0; e < E; e++) q[e] = q[e] * scale;
    if (b.weight_order == Order::in_lanes) {
      write(job.weight, b, all_good, q);
    } else {
      T rows[Size::capacity];
      to_rows(q, rows, size);
      write(job.weight, b, all_good, rows);
    }
  }

  // Takes lanes beyond the block's end out of `good`; true where every lane is good.
  MK_FN static bool settle(Block<R>& b) {
    const bool all_good = !any(!b.good) && b.used == N;
    for (int l = b.used; l < N; l++) b.good.v[l] = 0;
    return all_good;
  }

 public:
  Lanes(const Job& job, Size size)
      : job(job),
        size(size),
        E(size.n * size.p),
        momentum(momentum_of<R>(job)),
        step_size(step_size_of<R>(job)),
        native(job.storage == (sizeof(R) == 4 ? Storage::float32 : Storage::float64)),
        largest_square(job.storage == Storage::float16
                           ? R(StorageTraits<Float16>::largest) * R(StorageTraits<Float16>::largest)
                           : Limits<R>::huge_square) {}

  // One body for the three passes: they share all but the step size and what is stored.
  void run(const Pass& pass) const {
    const bool first = pass.kind == Pass::first, second = pass.kind == Pass::second;
    T sum = T(R(0)), lost = T(R(0));  // Kahan's sum, so that the length of a chunk costs no accuracy
    double alone_squares = 0;
    Block<R> b;
    for (int64_t k = pass.begin; k < pass.end; k += N) {
      find_block(job, k, pass.end, b);
      T q[Size::capacity], d[Size::capacity], xi[Size::capacity], buffer[Size::capacity];
      const T scale = scale_of(b);
      direction(b, second, scale, q, d, buffer);
      const T square = Map::project(q, d, xi, size);
      b.good = square_norm(d, E) <= T(largest_square);
      T step = T(R(0));
      if (!first) {
        step = -(second ? T(pass.step) : step_size(square)) / scale;
        b.good = b.good & (step * step * square <= T(Limits<R>::huge_square));
      }
      if (second && pass.skipped)
        for (int l = 0; l < b.used; l++)
          if (pass.skipped[b.k + l]) b.good.v[l] = 0;
      const bool all_good = settle(b);
      if (first) {
        const T term = select(b.good, square, T(R(0))) - lost, next = sum + term;
        lost = (next - sum) - term;
        sum = next;
      }
      if (!second && momentum.buffered) write(job.momentum, b, all_good, buffer);
      if (!first) {
        Map::retract(q, xi, step, square, size);
        write_weight(b, all_good, scale, q);
      }
      if (all_good) continue;
      for (int l = 0; l < b.used; l++) {
        if (b.good.v[l] || (second && pass.skipped && pass.skipped[b.k + l])) continue;
        const double stop = __builtin_nan("");
        const double lone = alone<R, Map>(job, b.k + l, second, first ? &stop : second ? &pass.step : nullptr);
        if (lone >= 0) {
          alone_squares += lone;
        } else if (!second) {
          pass.out->nonfinite++;
          if (first) pass.newly_skipped[b.k + l] = 1;
        }
      }
    }
    if (first) pass.out->square += total(sum) + alone_squares;
  }
};

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
