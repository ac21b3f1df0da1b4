// Steps of long vectors, elements in lanes: spheres, the columns of oblique matrices, PSI and Grassmann rows.
//
// A vector is read from memory once: its sums are taken before anything is written, and the second sweep, which takes
// the new momentum once more, finds it in the cache. A vector whose squares leave the range of the arithmetic type is
// computed by the same code in the next wider type.
#pragma once

#include "cpu/column_lanes.h"
#include "cpu/vector_grassmann.h"
#include "cpu/vector_quotient.h"

namespace mk {
namespace MK_ISA {
namespace {

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
  const ColumnLanes<R> columns;
  const int at_once;  // vectors, in lanes

  int64_t per_component() const { return by_columns(job) ? job.geometry->p : 1; }
  double scale_of(int64_t vector) const { return job.scale(vector / per_component()); }

  // f(the vector in the arithmetic type of its storage): in place where it lies so, but for 16-bit numbers that f
  // writes more than once.
  template <class F>
  MK_FN bool narrow(int64_t vector, bool stored, bool rewrites, const F& f) const {
    const Span span = span_of(job, vector);
    const double scale = scale_of(vector);
    const bool full = job.storage == Storage::float32 || job.storage == Storage::float64;
    if (!span.dense || (rewrites && !full)) return f(Vector<R, R, R>(job, span, scale, scratch, true, stored));
    bool result = false;
    with_storage<R>(job.storage,
                    [&](auto s) { result = f(Vector<R, R, decltype(s)>(job, span, scale, scratch, false, stored)); });
    return result;
  }

  // f(the vector in the next wider type).
  template <class F>
  __attribute__((noinline)) bool wide(int64_t vector, bool stored, const F& f) const {
    const Span span = span_of(job, vector);
    const Scratch<Wide> wide_scratch(span.length);
    return f(Vector<R, Wide, Wide>(job, span, scale_of(vector), wide_scratch.memory, true, stored));
  }

  // The sums of a vector; nothing is written. False where it is to stay as it is.
  bool measure(int64_t vector, VectorState& state) const {
    state.skipped = false;
    state.wide = !narrow(vector, false, false, [&](const auto& v) {
      return SphereVector<std::decay_t<decltype(v)>>(v, false).measure(state);
    });
    if (!state.wide) return true;
    return wide(vector, false, [&](const auto& v) {
      SphereVector<std::decay_t<decltype(v)>> sphere(v, false);
      return sphere.finite() && sphere.measure(state);
    });
  }

  // The buffer is the same whatever the arithmetic.
  void store_momentum(int64_t vector) const {
    narrow(vector, false, false, [&](const auto& v) {
      SphereVector<std::decay_t<decltype(v)>>(v, false).store_momentum();
      return true;
    });
  }

  void retract(int64_t vector, double step, const VectorState& state, bool stored) const {
    const bool done = !state.wide && narrow(vector, stored, false, [&](const auto& v) {
      SphereVector<std::decay_t<decltype(v)>> sphere(v, stored);
      sphere.take(state);
      if (!sphere.short_enough(step)) return false;
      sphere.retract(step);
      return true;
    });
    if (done) return;
    wide(vector, stored, [&](const auto& v) {
      SphereVector<std::decay_t<decltype(v)>> sphere(v, stored);
      VectorState again;
      sphere.measure(again);
      sphere.retract(step);
      return true;
    });
  }

  // f(vector, width) over the vectors of a component, `at_once` at a time.
  template <class F>
  MK_FN void each(int64_t k, const F& f) const {
    const int64_t end = (k + 1) * per_component();
    for (int64_t v = k * per_component(); v < end; v += at_once) f(v, int(end - v < at_once ? end - v : at_once));
  }

  // All vectors of a component, or none: false where one is to stay as it is.
  bool measure_component(int64_t k, Partial* out, VectorState* states) const {
    double square = 0;
    bool steps = true;
    each(k, [&](int64_t begin, int width) {
      const bool measured = at_once > 1 && columns.measure(begin, width, job.scale(k), states + begin);
      for (int64_t v = begin; v < begin + width; v++) {
        if (!measured) steps = steps && measure(v, states[v]);
        square += states[v].square;
      }
    });
    if (steps) {
      out->square += square;
    } else {
      out->nonfinite++;
      for (int64_t v = k * per_component(); v < (k + 1) * per_component(); v++) states[v].skipped = true;
    }
    return steps;
  }

  void store_component_momentum(int64_t k) const {
    each(k, [&](int64_t begin, int width) {
      if (at_once > 1) return columns.store_momentum(begin, width);
      store_momentum(begin);
    });
  }

  void retract_component(int64_t k, double step, const VectorState* states, bool stored) const {
    each(k, [&](int64_t begin, int width) {
      if (at_once > 1 && columns.retract(begin, width, job.scale(k), step, states + begin, stored)) return;
      for (int64_t v = begin; v < begin + width; v++) retract(v, step, states[v], stored);
    });
  }

 public:
  Vectors(const Job& job, void* scratch)
      : job(job),
        scratch(static_cast<R*>(scratch)),
        columns(job, this->scratch),
        at_once(ColumnLanes<R>::fits(job) ? Pack<R>::lanes : 1) {}

  void first(int64_t from, int64_t to, Partial* out, VectorState* states) const {
    for (int64_t k = from; k < to; k++)
      if (measure_component(k, out, states) && job.momentum) store_component_momentum(k);
  }

  void second(int64_t from, int64_t to, double step, const VectorState* states) const {
    for (int64_t k = from; k < to; k++)
      if (!states[k * per_component()].skipped) retract_component(k, step, states, job.momentum != nullptr);
  }

  void whole(int64_t from, int64_t to, Partial* out, VectorState* states) const {
    if (job.rule == Rule::fg_sgd) {
      const StepSize<double> step_size = step_size_of<double>(job);
      for (int64_t k = from; k < to; k++) {
        Partial partial{0, 0};
        const bool steps = measure_component(k, &partial, states);
        if (steps) retract_component(k, step_size(partial.square), states, false);
        out->nonfinite += partial.nonfinite;
        if (job.norms) job.norms[k] = steps ? __builtin_sqrt(partial.square) : __builtin_nan("");
      }
      return;
    }
    for (int64_t k = from; k < to; k++) {
      const auto step = [&](const auto& v) {
        using V = std::decay_t<decltype(v)>;
        if (job.rule == Rule::psi_sgd) return QuotientVector<V>(v).step();
        return GrassmannVector<V>(v).step(job.component(k));
      };
      if (!narrow(k, false, job.rule != Rule::psi_sgd, step) && !wide(k, false, step)) out->nonfinite++;
    }
  }
};

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
