// PSI-SGD and PSI-SGDM ([PSI] Eq. 9-11).
#include "cuda/rows.cuh"
#include "manifolds/scale_invariant.h"

namespace mk {
namespace cuda {
namespace {

template <class R, class T>
class ScaleInvariantRow {
  const Rules<R> rules;
  const Hyper& h;
  const Span<R, T> span;
  const bool buffered, old;

 public:
  MK_DEVICE ScaleInvariantRow(const Tables& t, const Group& g, int64_t row)
      : rules(t, g),
        h(t.hyper[g.hyper]),
        span(t, g, row),
        buffered(rules.momentum.buffered),
        old(buffered && !rules.momentum.first) {}

  MK_DEVICE bool step() const {
    double ww = 0;
    uint32_t top = 0, weights = 0;
    span.template each<false>(true, old, false, false, [&](int64_t, R w, R g, R m, auto) {
      ww = fma(double(w), double(w), ww);
      top = larger(top, magnitude(rules.divided(g)));
      weights = larger(weights, larger(magnitude(w), magnitude(m)));
    });
    ww = T::sum(ww);
    top = T::largest(top);
    if (larger(top, T::largest(weights)) >= Range<R>::beyond) return false;
    // In units near the longest gradient, so that lr ||w||^2 times it overflows only where u does.
    const Unit<R> unit(top);
    const double rate = h.lr * ww, size = rate * double(unit.size);
    const R minus_rate = R(-size), rho = R(buffered ? h.momentum : 0);
    const R kept = R(scale_invariant::keep(rate * h.weight_decay));
    // The new u as it is stored, and w.
    const auto next = [&](R& w, R g, R& m, auto s) {
      m = scale_invariant::velocity(m, rules.divided(g) * unit.inverse, rho, minus_rate);
      if (buffered) m = as_stored<decltype(s)>(m);
      w = scale_invariant::step(w, m, kept);
    };
    double after = 0;
    uint32_t velocity = 0, weight = 0;
    span.template each<false>(true, old, false, false, [&](int64_t, R w, R g, R m, auto s) {
      next(w, g, m, s);
      after = fma(double(w), double(w), after);
      weight = larger(weight, magnitude(as_stored<decltype(s)>(w)));
      velocity = larger(velocity, magnitude(m));
    });
    after = T::sum(after);
    velocity = T::largest(velocity);
    weight = T::largest(weight);
    const bool guarded = after > h.guard * h.guard;
    const R factor = guarded ? R(1 / sqrt(after)) : R(1);
    // A weight that cannot be stored as it is fits again where the guard divides it.
    const bool fits = guarded ? after <= double(Limits<double>::largest) : weight < Range<R>::beyond;
    if (velocity >= Range<R>::beyond || !fits) return sizeof(R) == 4 && !buffered && step_beyond(rate);
    span.template each<true>(true, old, true, buffered, [&](int64_t, R& w, R g, R& m, auto s) {
      next(w, g, m, s);
      w = w * factor;
      m = m * factor;
    });
    return true;
  }

 private:
  // Where float cannot hold what is added to w, and nothing has to keep it: in double, if the guard divides it.
  MK_DEVICE bool step_beyond(double rate) const {
    const double minus_rate = -rate, kept = scale_invariant::keep(rate * h.weight_decay);
    const auto next = [&](R w, R g) { return fma(double(w), kept, double(rules.divided(g)) * minus_rate); };
    double after = 0;
    span.template each<false>(true, false, false, false, [&](int64_t, R w, R g, R, auto) {
      const double x = next(w, g);
      after = fma(x, x, after);
    });
    after = T::sum(after);
    if (!(after > h.guard * h.guard)) return false;
    const double factor = 1 / sqrt(after);
    span.template each<true>(true, false, true, false,
                             [&](int64_t, R& w, R g, R&, auto) { w = R(next(w, g) * factor); });
    return true;
  }
};

}  // namespace

void add_scale_invariant(std::vector<Kernel>& table) {
  Rows<ScaleInvariantRow>::add_all(table, Engine::scale_invariant);
}

}  // namespace cuda
}  // namespace mk
