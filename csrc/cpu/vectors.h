// Steps of long vectors, elements in lanes: spheres, the columns of oblique matrices, PSI and Grassmann rows.
//
// A vector is read from memory once: its sums are taken in double, norms after the step follow from them in closed
// form, and the later sweeps find it in the cache. A vector whose squares leave the range of the arithmetic type is
// computed by the same code in the next wider type.
#pragma once

#include "cpu/rows.h"
#include "manifolds/grassmann.h"
#include "manifolds/scale_invariant.h"
#include "manifolds/sphere.h"

namespace mk {
namespace MK_ISA {
namespace {

// R is the arithmetic type of the storage, A the one computed in: R, or the next wider one.
template <class R, class A>
class Vector {
  using Scalar = decltype(double{} + A{});
  static constexpr bool wide = sizeof(A) != sizeof(R);

  const Job& job;
  const Span span;
  const int64_t n;
  const Momentum<A> momentum;
  const Scalar scale;
  A *w, *fresh, *m;
  const A* g;
  bool staged;  // w, g and m are copies
  struct {
    Scalar qq, qm, square;
  } sums;  // as in VectorState, where the squares of doubles would overflow

  // Elements beyond this in a 16-bit buffer would be stored as infinity.
  Scalar largest() const {
    return job.storage == Storage::float16 ? Scalar(largest_float16) : Scalar(Limits<R>::largest);
  }
  // Squares up to here take the fast path.
  Scalar fast_square() const {
    const Scalar limit = Scalar(Limits<R>::huge_square);
    return job.storage == Storage::float16 ? largest() * largest() : limit;
  }

  // The new buffer as it will be stored. The buffer of the wide path is the narrow one's, rounding included.
  template <class V>
  MK_FN V new_buffer(V grad, V old) const {
    if constexpr (wide) {
      return V(as_stored(job.storage, momentum_of<R>(job).buffer(R(grad), R(old))));
    } else {
      return as_stored(job.storage, momentum.buffer(grad, old));
    }
  }

  // The gradient, divided: a quotient is rounded to R on the wide path, too.
  template <class V>
  MK_FN V gradient(int64_t i) const {
    if constexpr (wide) {
      return V(momentum_of<R>(job).gradient(R(0), R(g[i])));
    } else {
      return momentum.gradient(V(A(0)), at<V>(g + i));
    }
  }

  MK_FN static bool is_finite(A grad) { return Scalar(abs(grad)) <= Scalar(Limits<R>::largest); }

  // f(i, tag) over all elements; the wide path goes one by one.
  template <class F>
  MK_FN void each(const F& f) const {
    if constexpr (wide) {
      for (int64_t i = 0; i < n; i++) f(i, A{});
    } else {
      sweep<A>(n, f);
    }
  }

  bool gradients_finite() const {
    for (int64_t i = 0; i < n; i++)
      if (!is_finite(g[i])) return false;
    return true;
  }

  bool all_within(const A* x, Scalar limit) const {
    for (int64_t i = 0; i < n; i++)
      if (!(Scalar(abs(x[i])) <= limit)) return false;
    return true;
  }

 public:
  // `scratch`: vector_scratch arrays of n elements.
  Vector(const Job& job, int64_t vector, A* scratch, bool second)
      : job(job),
        span(span_of(job, vector)),
        n(span.length),
        momentum(momentum_of<A>(job)),
        scale(Scalar(job.scale(by_columns(job) ? vector / job.geometry->p : vector))) {
    const Geometry& geometry = *job.geometry;
    const bool direct = !wide && span.dense && (job.storage == Storage::float32 || job.storage == Storage::float64);
    staged = !direct;
    A* spare = scratch;
    const auto place = [&](const void* base, const int64_t* stride, int64_t start, bool wanted) -> A* {
      A* here = spare;
      spare += n;
      if (!wanted) return here;
      if (direct) return const_cast<A*>(static_cast<const A*>(base)) + start;
      gather<A, R>(job, span, base, stride, start, here);
      return here;
    };
    w = place(job.weight, geometry.weight_stride, span.weight, true);
    A* const divided = spare;
    g = place(job.grad, geometry.grad_stride, span.grad, !second || !momentum.buffer_is_direction());
    if (job.rule != Rule::fg_sgd && !momentum.plain) {  // PSI, SGD-G and Adam-G sweep over quotients
      for (int64_t i = 0; i < n; i++) divided[i] = gradient<A>(i);
      g = divided;
    }
    const bool old = job.momentum && (second || !job.first_step);
    m = place(job.momentum, geometry.weight_stride, span.weight, old);
    fresh = spare;
    if (direct && job.momentum) m = static_cast<A*>(job.momentum) + span.weight;
  }

  // --- FG-SGD on the sphere ---

  // Whether weight, gradient and new buffer are finite; the buffer is computed and thrown away.
  bool finite() const {
    for (int64_t i = 0; i < n; i++) {
      const A grad = gradient<A>(i);
      const A kept = momentum.buffered ? new_buffer(grad, momentum.first ? A(0) : m[i]) : grad;
      if (!is_finite(grad) || !(Scalar(abs(kept)) <= largest()) || !(Scalar(abs(w[i])) <= largest())) return false;
    }
    return true;
  }

  // The direction d into `fresh`, with its sums. False where the vector must be left to the wide type.
  bool direct(bool second, VectorState& state) {
    Sum<A> qq, qm, mm;
    each([&](int64_t i, auto tag) {
      using V = decltype(tag);
      const V weight = at<V>(w + i);
      V d;
      if (second && momentum.buffer_is_direction()) {
        d = at<V>(m + i);
      } else {
        const V grad = gradient<V>(i);
        if (momentum.buffered) {
          const V buffer = second ? at<V>(m + i) : new_buffer(grad, momentum.first ? V(A(0)) : at<V>(m + i));
          if (!second) to(fresh + i, buffer);
          d = momentum.direction(grad, buffer);
        } else {
          d = grad;
        }
      }
      // The buffer is what the second sweep stores; with nesterov the direction is formed from it once more there.
      if (second || !momentum.buffered) to(fresh + i, d);
      qq.add(weight, weight);
      qm.add(weight, d);
      mm.add(d, d);
    });
    const Scalar square = mm.value();
    if (!wide && !(square <= fast_square() && qq.value() <= fast_square())) return false;
    const Scalar inner = qm.value() / scale, norm = qq.value() / (scale * scale);
    Scalar tangent = sphere::tangent_square(norm, inner, square);
    if (tangent < square * (sizeof(A) == 4 ? Scalar(1e-6) : Scalar(0.25))) {
      Sum<A> direct_square;
      each([&](int64_t i, auto tag) {
        using V = decltype(tag);
        const V x = sphere::rgrad(at<V>(w + i) * V(A(1 / scale)), direction(at<V>(fresh + i), i, second), V(A(inner)));
        direct_square.add(x, x);
      });
      tangent = direct_square.value();
    }
    sums = {norm, inner, tangent};
    state.qq = double(norm);
    state.qm = double(inner);
    state.square = double(tangent);
    state.skipped = false;
    return true;
  }

  // Takes d from the stored buffer, and its sums from the first pass, instead of direct().
  void direction_is_buffer(const VectorState& state) {
    fresh = m;
    sums = {state.qq, state.qm, state.square};
  }

  // d, from what direct() or direction_is_buffer() left in `fresh`.
  template <class V>
  MK_FN V direction(V kept, int64_t i, bool second) const {
    if (second || !momentum.buffered || !momentum.nesterov) return kept;
    return momentum.direction(gradient<V>(i), kept);
  }

  // `fresh` becomes the buffer.
  void store_momentum() {
    if (!momentum.buffered) return;
    if (staged) {
      scatter<A, R>(job, span, job.momentum, fresh);
    } else {
      each([&](int64_t i, auto tag) { to(m + i, at<decltype(tag)>(fresh + i)); });
    }
  }

  bool short_enough(Scalar step, const VectorState& state) const {
    const Scalar v = step / scale;
    return wide || v * v * Scalar(state.square) <= Scalar(Limits<R>::huge_square);
  }

  // W <- R_W(-step xi), with d in `fresh`.
  void retract(Scalar step, bool second) {
    const Scalar v = -step / scale, qq = sums.qq, qm = sums.qm, square = sums.square;
    const auto arc = job.retraction == Retraction::exp ? sphere::exp(v, square) : sphere::projection(v);
    const auto end = sphere::combination(arc, qq, qm, square);
    combine(A(end.a), A(scale * end.b), second);
    // Where the radial part of d is long against the result, the combination cancels: measure it and normalise once
    // more.
    if (abs(arc.b * qm) > Scalar(0.5)) {
      Sum<A> sum;
      each([&](int64_t i, auto tag) {
        const auto x = at<decltype(tag)>(w + i);
        sum.add(x, x);
      });
      if (sum.value() > 0) rescale(w, scale / sqrt(sum.value()));
    }
    store_weight();
  }

  void combine(A alpha, A beta, bool second) {
    each([&](int64_t i, auto tag) {
      using V = decltype(tag);
      to(w + i, fma(at<V>(w + i), V(alpha), direction(at<V>(fresh + i), i, second) * V(beta)));
    });
  }

  void rescale(A* x, Scalar factor) {
    each([&](int64_t i, auto tag) {
      using V = decltype(tag);
      to(x + i, at<V>(x + i) * V(A(factor)));
    });
  }

  void store_weight() {
    if (staged) scatter<A, R>(job, span, job.weight, w);
  }

  // --- PSI ---

  // False where the vector must be left to the wide type, or as it is.
  bool psi() {
    const Hyper& h = job.hyper;
    const bool old = job.momentum && !job.first_step;
    Sum<A> ww, gg, uu;
    each([&](int64_t i, auto tag) {
      using V = decltype(tag);
      const V x = at<V>(w + i), y = at<V>(g + i);
      ww.add(x, x);
      gg.add(y, y);
      if (old) {
        const V z = at<V>(m + i);
        uu.add(z, z);
      }
    });
    const Scalar square = ww.value();
    const Scalar rate = h.lr * square;
    // No element of the new u, nor of the new w, is longer than this.
    const Scalar bound = sqrt(square) + Scalar(h.momentum) * sqrt(uu.value()) + rate * sqrt(gg.value());
    if (!wide && !(bound * bound <= fast_square())) return false;
    const A minus_rate = A(-rate), rho = A(job.momentum ? h.momentum : 0);
    const A kept = A(scale_invariant::keep(Scalar(rate * h.weight_decay)));
    Sum<A> after;
    bool fits = true;
    each([&](int64_t i, auto tag) {
      using V = decltype(tag);
      const V y = at<V>(g + i);
      V u = scale_invariant::velocity(old ? at<V>(m + i) : V(A(0)), y, V(rho), V(minus_rate));
      if constexpr (wide) {
        if (job.momentum) u = V(as_stored(job.storage, R(u)));
        fits = fits && is_finite(y) && !(job.momentum && !(Scalar(abs(u)) <= largest()));
      } else if (job.momentum) {
        u = as_stored(job.storage, u);
      }
      const V x = scale_invariant::step(at<V>(w + i), u, V(kept));
      to(w + i, x);
      if (job.momentum) to(fresh + i, u);
      after.add(x, x);
    });
    if (after.value() > Scalar(h.guard) * Scalar(h.guard)) {
      const Scalar inverse = 1 / sqrt(after.value());
      rescale(w, inverse);
      if (job.momentum) rescale(fresh, inverse);
    }
    if (wide && !(fits && all_within(w, largest()))) return false;
    store_weight();
    store_momentum();
    return true;
  }

  // --- SGD-G and Adam-G ---

  bool grassmann(int64_t component) {
    const Hyper& h = job.hyper;
    const bool adam = job.rule == Rule::adam_g, old = job.momentum && !job.first_step;
    Sum<A> ww, wg, gg, tt;
    each([&](int64_t i, auto tag) {
      using V = decltype(tag);
      const V x = at<V>(w + i), y = at<V>(g + i);
      ww.add(x, x);
      wg.add(x, y);
      gg.add(y, y);
      if (old) {
        const V z = at<V>(m + i);
        tt.add(z, z);
      }
    });
    if (wide ? !(gradients_finite() && (!old || all_within(m, largest())))
             : !(gg.value() <= fast_square() && tt.value() <= fast_square()))
      return false;
    const Scalar norm = sqrt(ww.value());
    if (!(norm >= 0)) return false;
    const Scalar unit = norm > 0 ? 1 / norm : Scalar(0);  // a zero row takes the direction of its first step
    const A inverse = A(unit), inner = A(wg.value() * unit);
    Sum<A> hh;
    each([&](int64_t i, auto tag) {
      using V = decltype(tag);
      const V x = sphere::rgrad(at<V>(w + i) * V(inverse), at<V>(g + i), V(inner));
      to(fresh + i, x);
      hh.add(x, x);
    });
    const Scalar length = sqrt(hh.value()), clip = grassmann::clip(length, Scalar(h.clip));
    // d = old tau + gain h, moved along by `factor`
    Scalar factor = 1, gain = -h.lr * clip;
    const Scalar keep = old ? Scalar(h.momentum) : Scalar(0);
    if (adam) {
      const Scalar before = job.first_step ? Scalar(0) : Scalar(variance(component));
      const Scalar second = h.beta2 * before + (1 - h.beta2) * (clip * length) * (clip * length);
      const Scalar t = Scalar(job.step + 1);
      gain = (1 - h.momentum) * clip;
      factor = -h.lr * sqrt(1 - power(h.beta2, t)) / (1 - power(h.momentum, t)) / sqrt(second + h.eps);
      set_variance(component, second);
    }
    Sum<A> dd, qd;
    each([&](int64_t i, auto tag) {
      using V = decltype(tag);
      V d = at<V>(fresh + i) * V(A(gain));
      if (old) d = fma(at<V>(m + i), V(A(keep)), d);
      to(fresh + i, d);
      dd.add(d, d);
      qd.add(at<V>(w + i), d);
    });
    // The transported momentum is tangent but for rounding: what is radial in d is taken out.
    const Scalar radial = qd.value() * unit;
    const Scalar tangent = max(dd.value() - radial * radial, Scalar(0));
    const grassmann::Geodesic<Scalar> geodesic(sqrt(tangent), factor);
    Sum<A> after, across;
    each([&](int64_t i, auto tag) {
      using V = decltype(tag);
      const V q = at<V>(w + i) * V(inverse);
      const V d = fma(q, V(A(-radial)), at<V>(fresh + i));
      const V point = fma(q, V(A(geodesic.cosine)), d * V(A(geodesic.along)));
      const V carried = fma(d, V(A(geodesic.cosine)), -(q * V(A(geodesic.turn))));
      to(w + i, point);
      to(fresh + i, carried);
      after.add(point, point);
      across.add(point, carried);
    });
    const Scalar final_square = after.value() > 0 ? after.value() : Scalar(1);
    const A off = A(across.value() / final_square);
    each([&](int64_t i, auto tag) {
      using V = decltype(tag);
      const V point = at<V>(w + i);
      to(fresh + i, fma(point, V(-off), at<V>(fresh + i)));
      to(w + i, point * V(A(1 / sqrt(final_square))));
    });
    store_weight();
    store_momentum();
    return true;
  }

 private:
  Scalar variance(int64_t component) const {
    return job.storage == Storage::float64 ? Scalar(static_cast<const double*>(job.variance)[component])
                                           : Scalar(static_cast<const float*>(job.variance)[component]);
  }
  void set_variance(int64_t component, Scalar v) const {
    if (job.storage == Storage::float64) {
      static_cast<double*>(job.variance)[component] = double(v);
    } else {
      static_cast<float*>(job.variance)[component] = float(v);
    }
  }
  static Scalar power(double base, Scalar t) { return Scalar(__builtin_pow(base, double(t))); }
};

// Arrays for the wide type, needed so rarely that they are allocated where they are.
template <class Wide>
struct Scratch {
  Wide* memory;
  explicit Scratch(int64_t n)
      : memory(static_cast<Wide*>(__builtin_malloc(size_t(vector_scratch) * n * sizeof(Wide)))) {}
  ~Scratch() { __builtin_free(memory); }
};

template <class R>
class Vectors {
  using Wide = typename StorageTraits<R>::Wide;
  const Job& job;
  R* const scratch;

  int64_t length() const { return by_columns(job) ? job.geometry->n : job.geometry->elements(); }
  int64_t per_component() const { return by_columns(job) ? job.geometry->p : 1; }

  // The first half of FG-SGD for one vector: momentum and norm. False where it is left as it is.
  bool begin(int64_t vector, VectorState& state) const {
    Vector<R, R> narrow(job, vector, scratch, false);
    state.wide = false;
    if (narrow.direct(false, state)) {
      narrow.store_momentum();
      return true;
    }
    state.wide = true;
    Scratch<Wide> wide_scratch(length());
    Vector<R, Wide> wide(job, vector, wide_scratch.memory, false);
    if (!wide.finite() || !wide.direct(false, state)) {
      state.skipped = true;
      return false;
    }
    wide.store_momentum();
    return true;
  }

  void finish(int64_t vector, double step, const VectorState& state) const {
    if (state.skipped) return;
    if (!state.wide) {
      Vector<R, R> narrow(job, vector, scratch, true);
      if (narrow.short_enough(step, state)) {
        VectorState same;
        if (job.momentum && job.hyper.nesterov == 0) {
          narrow.direction_is_buffer(state);
        } else {
          narrow.direct(true, same);
        }
        return narrow.retract(step, true);
      }
    }
    Scratch<Wide> wide_scratch(length());
    Vector<R, Wide> wide(job, vector, wide_scratch.memory, true);
    VectorState again;
    wide.direct(true, again);
    wide.retract(step, true);
  }

  // All columns of a component, or none.
  bool component_finite(int64_t k) const {
    if (per_component() == 1) return true;
    for (int64_t v = k * per_component(); v < (k + 1) * per_component(); v++)
      if (!Vector<R, R>(job, v, scratch, false).finite()) return false;
    return true;
  }

 public:
  Vectors(const Job& job, void* scratch) : job(job), scratch(static_cast<R*>(scratch)) {}

  void first(int64_t from, int64_t to, Partial* out, VectorState* states) const {
    for (int64_t k = from; k < to; k++) {
      bool stepped = component_finite(k);
      for (int64_t v = k * per_component(); v < (k + 1) * per_component(); v++) {
        states[v].skipped = !stepped;
        if (!stepped) continue;
        stepped = begin(v, states[v]);
        if (stepped) out->square += states[v].square;
      }
      if (!stepped) out->nonfinite++;
    }
  }

  void second(int64_t from, int64_t to, double step, const VectorState* states) const {
    for (int64_t v = from * per_component(); v < to * per_component(); v++) finish(v, step, states[v]);
  }

  void whole(int64_t from, int64_t to, Partial* out, VectorState* states) const {
    if (job.rule == Rule::fg_sgd) {
      const StepSize<double> step_size = step_size_of<double>(job);
      for (int64_t k = from; k < to; k++) {
        Partial partial{0, 0};
        first(k, k + 1, &partial, states);
        second(k, k + 1, step_size(partial.square), states);
        out->nonfinite += partial.nonfinite;
        if (job.norms) job.norms[k] = partial.nonfinite ? __builtin_nan("") : __builtin_sqrt(partial.square);
      }
      return;
    }
    for (int64_t k = from; k < to; k++) {
      if (apply(Vector<R, R>(job, k, scratch, false), k)) continue;
      Scratch<Wide> wide_scratch(length());
      if (!apply(Vector<R, Wide>(job, k, wide_scratch.memory, false), k)) out->nonfinite++;
    }
  }

 private:
  template <class V>
  bool apply(V vector, int64_t k) const {
    return job.rule == Rule::psi_sgd ? vector.psi() : vector.grassmann(job.component(k));
  }
};

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
