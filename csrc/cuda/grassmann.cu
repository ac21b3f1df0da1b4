// SGD-G and Adam-G (Cho & Lee 2017).
#include "cuda/rows.cuh"
#include "manifolds/grassmann.h"
#include "manifolds/sphere.h"

namespace mk {
namespace cuda {
namespace {

template <class R, class T>
class GrassmannRow {
  const Tables& t;
  const Group& g;
  const Rules<R> rules;
  const Hyper& h;
  const Span<R, T> span;
  const bool old;  // there is a momentum to go on with

 public:
  MK_DEVICE GrassmannRow(const Tables& t, const Group& g, int64_t row)
      : t(t),
        g(g),
        rules(t, g),
        h(t.hyper[g.hyper]),
        span(t, g, row),
        old(rules.momentum.buffered && !rules.momentum.first) {}

  MK_DEVICE bool step() const {
    double ww = 0, wg = 0;
    uint32_t top = 0, others = 0;
    span.template each<false>(true, old, false, false, [&](int64_t, R w, R grad, R m, auto) {
      ww = fma(double(w), double(w), ww);
      top = larger(top, magnitude(rules.divided(grad)));
      others = larger(others, larger(magnitude(w), magnitude(m)));
    });
    ww = T::sum(ww);
    top = T::largest(top);
    if (larger(top, T::largest(others)) >= Range<R>::beyond || !(ww < double(Limits<double>::largest))) return false;
    const Unit<R> gradient_unit(top);
    const double size = double(gradient_unit.size);
    const double unit = ww > 0 ? 1 / sqrt(ww) : 0;  // a zero row takes the direction of its first step
    const R inverse = R(unit);
    span.template each<false>(true, false, false, false, [&](int64_t, R w, R grad, R, auto) {
      wg = fma(double(w), double(rules.divided(grad) * gradient_unit.inverse), wg);
    });
    const R inner = R(T::sum(wg) * unit);
    // h = g - w <w, g> in units of the gradient's size
    const auto tangent = [&](R w, R grad) {
      return sphere::rgrad(w * inverse, rules.divided(grad) * gradient_unit.inverse, inner);
    };
    double hh = 0;
    span.template each<false>(true, false, false, false, [&](int64_t, R w, R grad, R, auto) {
      const R x = tangent(w, grad);
      hh = fma(double(x), double(x), hh);
    });
    const double length = sqrt(T::sum(hh));
    // h clipped to nu, as a factor of what tangent() gives
    const double clipped = length * size > h.clip ? h.clip / length : size;
    // d = keep tau + gain h, moved along by `factor`
    double factor = 1, gain = -h.lr * clipped, second = 0;
    const bool adam = g.rule == Rule::adam_g;
    if (adam) {
      const double count = double(t.steps[g.parameter] + 1);
      second =
          h.beta2 * (rules.momentum.first ? 0 : variance()) + (1 - h.beta2) * (clipped * length) * (clipped * length);
      gain = (1 - h.momentum) * clipped;
      factor = -h.lr * sqrt(1 - pow(h.beta2, count)) / (1 - pow(h.momentum, count)) / sqrt(second + h.eps);
    }
    const R keep = R(old ? h.momentum : 0), push = R(gain);
    const auto direction = [&](R w, R grad, R m) { return fma(m, keep, tangent(w, grad) * push); };
    double dd = 0, qd = 0;
    span.template each<false>(true, old, false, false, [&](int64_t, R w, R grad, R m, auto) {
      const R d = direction(w, grad, m);
      dd = fma(double(d), double(d), dd);
      qd = fma(double(w), double(d), qd);
    });
    // The transported momentum is tangent but for rounding: what is radial in d is taken out.
    const double radial = T::sum(qd) * unit, square = T::sum(dd) - radial * radial;
    const grassmann::Geodesic<double> geodesic(sqrt(square > 0 ? square : 0), factor);
    const R cosine = R(geodesic.cosine), along = R(geodesic.along), turn = R(geodesic.turn), off = R(-radial);
    // The point and what is carried, before they are put right against rounding.
    const auto move = [&](R& w, R grad, R& m) {
      const R q = w * inverse, d = fma(q, off, direction(w, grad, m));
      w = fma(q, cosine, d * along);
      m = fma(d, cosine, -(q * turn));
    };
    double after = 0, across = 0;
    span.template each<false>(true, old, false, false, [&](int64_t, R w, R grad, R m, auto) {
      move(w, grad, m);
      after = fma(double(w), double(w), after);
      across = fma(double(w), double(m), across);
    });
    after = T::sum(after);
    across = T::sum(across);
    const double final_square = after > 0 ? after : 1;
    const R slope = R(-across / final_square), normal = R(1 / sqrt(final_square));
    T::sync();  // all have read the old one
    if (adam && T::rank() == 0) set_variance(second);
    span.template each<true>(true, old, true, rules.momentum.buffered, [&](int64_t, R& w, R grad, R& m, auto) {
      move(w, grad, m);
      m = fma(w, slope, m);
      w = w * normal;
    });
    return true;
  }

 private:
  MK_DEVICE R* variance_at() const { return static_cast<R*>(t.tensors[g.parameter].variance) + span.component; }
  MK_DEVICE double variance() const { return double(*variance_at()); }
  MK_DEVICE void set_variance(double v) const { *variance_at() = R(v); }
};

}  // namespace

void add_grassmann(std::vector<Kernel>& table) { Rows<GrassmannRow>::add_all(table, Engine::grassmann); }

}  // namespace cuda
}  // namespace mk
