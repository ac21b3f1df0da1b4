// PSI-SGD of one long vector: ||w|| in a first sweep, and a bound on everything that the second one writes.
#pragma once

#include "cpu/vector.h"
#include "manifolds/scale_invariant.h"

namespace mk {
namespace MK_ISA {
namespace {

template <class V>
class QuotientVector {
  using A = typename V::Number;
  using Scalar = typename V::Scalar;
  const V& vector;
  A rho, minus_rate, keep;

  template <class T>
  struct Point {
    T w, u;
  };
  // After the step, the buffer as it will be stored.
  template <class T, class Elements>
  MK_FN static Point<T> point(const Elements& from, int64_t i, A rho, A minus_rate, A keep) {
    T u =
        scale_invariant::velocity(from.template old_buffer<T>(i), from.template gradient<T>(i), T(rho), T(minus_rate));
    if (from.momentum.buffered) u = from.rounded(u);
    return {scale_invariant::step(from.template weight<T>(i), u, T(keep)), u};
  }

  struct Norms {
    Scalar w, g, u;  // squares
  };
  template <class Sum>
  Norms measure() const {
    const auto from = vector.elements(false);
    Sum ww, gg, uu;
    vector.each(
        [&, from](int64_t i, auto tag) {
          using T = decltype(tag);
          const T w = from.template weight<T>(i), g = from.template gradient<T>(i), u = from.template old_buffer<T>(i);
          ww.add(w, w);
          gg.add(g, g);
          uu.add(u, u);
        },
        ww, gg, uu);
    return {ww.value(), gg.value(), uu.value()};
  }

  __attribute__((noinline)) Scalar square_after() const {
    const auto from = vector.elements(false);
    const A rho = this->rho, minus_rate = this->minus_rate, keep = this->keep;
    Sum<A> after;
    vector.each([&, from](int64_t i, auto tag) {
      const auto x = point<decltype(tag)>(from, i, rho, minus_rate, keep).w;
      after.add(x, x);
    });
    return after.value();
  }

  // On the wide path, where no norm bounds what would be stored.
  bool finite(Scalar factor) const {
    const auto from = vector.elements(false);
    for (int64_t i = 0; i < vector.n; i++) {
      const auto [w, u] = point<A>(from, i, rho, minus_rate, keep);
      if (!V::is_finite(from.template gradient<A>(i)) || !vector.is_within(w * A(factor)) ||
          (from.momentum.buffered && !vector.is_within(u)))
        return false;
    }
    return true;
  }

 public:
  explicit QuotientVector(const V& vector) : vector(vector) {}

  // False where the vector must be left to the wide type, or as it is.
  bool step() {
    const Hyper& h = vector.job.hyper;
    Norms square = measure<typename V::Quick>();
    if (std::is_same<A, float>::value && !(in_float_range(square.w) && square.g <= 1e30 && square.u <= 1e30))
      square = measure<Sum<A>>();
    const Scalar rate = h.lr * square.w;
    // No element of the new u, nor of the new w, is longer than this.
    const Scalar bound = sqrt(square.w) + Scalar(h.momentum) * sqrt(square.u) + rate * sqrt(square.g);
    if (!vector.is_fast(bound * bound)) return false;
    rho = A(vector.job.momentum ? h.momentum : 0);
    minus_rate = A(-rate);
    keep = A(scale_invariant::keep(Scalar(rate * h.weight_decay)));
    Scalar factor = 1;
    if (!(bound <= Scalar(h.guard))) {
      const Scalar after = square_after();
      if (after > Scalar(h.guard) * Scalar(h.guard)) factor = 1 / sqrt(after);
    }
    if (V::wide && !finite(factor)) return false;
    write(A(factor));
    vector.store_weight();
    vector.store_momentum();
    return true;
  }

 private:
  void write(A factor) const {
    const auto from = vector.elements(false);
    const A rho = this->rho, minus_rate = this->minus_rate, keep = this->keep;
    const bool guarded = factor != A(1);
    vector.each([=](int64_t i, auto tag) {
      using T = decltype(tag);
      auto [w, u] = point<T>(from, i, rho, minus_rate, keep);
      if (guarded) {
        w = w * T(factor);
        u = u * T(factor);
      }
      if (from.momentum.buffered) from.to(from.m + i, u);
      from.to(from.w + i, w);
    });
  }
};

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
