// SGD-G and Adam-G of one long vector.
#pragma once

#include "cpu/vector.h"
#include "manifolds/grassmann.h"
#include "manifolds/sphere.h"

namespace mk {
namespace MK_ISA {
namespace {

template <class V>
class GrassmannVector {
  using A = typename V::Number;
  using Scalar = typename V::Scalar;
  const V& vector;
  const Job& job;

  // Gradients, and what is carried.
  bool finite() const {
    const auto from = vector.elements(false);
    for (int64_t i = 0; i < vector.n; i++)
      if (!V::is_finite(from.template gradient<A>(i)) || !vector.is_within(from.template old_buffer<A>(i)))
        return false;
    return true;
  }

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

 public:
  // Weight and direction are written more than once: 16-bit ones are to be copies.
  explicit GrassmannVector(const V& vector) : vector(vector), job(vector.job) {}

  // False where the vector must be left to the wide type, or as it is.
  bool step(int64_t component) {
    const Hyper& h = job.hyper;
    const bool adam = job.rule == Rule::adam_g;
    const auto from = vector.elements(false);
    A* const fresh = vector.spare();
    Sum<A> ww, wg, gg, tt;
    vector.each([&, from](int64_t i, auto tag) {
      using T = decltype(tag);
      const T x = from.template weight<T>(i), y = from.template gradient<T>(i), z = from.template old_buffer<T>(i);
      ww.add(x, x);
      wg.add(x, y);
      gg.add(y, y);
      tt.add(z, z);
    });
    if (V::wide ? !finite() : !(vector.is_fast(gg.value()) && vector.is_fast(tt.value()))) return false;
    const Scalar norm = sqrt(ww.value());
    if (!(norm >= 0)) return false;
    const Scalar unit = norm > 0 ? 1 / norm : Scalar(0);  // a zero row takes the direction of its first step
    const A inverse = A(unit), inner = A(wg.value() * unit);
    Sum<A> hh;
    vector.each([&, from, fresh](int64_t i, auto tag) {
      using T = decltype(tag);
      const T x = sphere::rgrad(from.template weight<T>(i) * T(inverse), from.template gradient<T>(i), T(inner));
      to(fresh + i, x);
      hh.add(x, x);
    });
    const Scalar length = sqrt(hh.value()), clip = grassmann::clip(length, Scalar(h.clip));
    // d = old tau + gain h, moved along by `factor`
    Scalar factor = 1, gain = -h.lr * clip;
    const Scalar keep = job.momentum && !job.first_step ? Scalar(h.momentum) : Scalar(0);
    if (adam) {
      const Scalar before = job.first_step ? Scalar(0) : Scalar(variance(component));
      const Scalar second = h.beta2 * before + (1 - h.beta2) * (clip * length) * (clip * length);
      const Scalar t = Scalar(job.step + 1);
      gain = (1 - h.momentum) * clip;
      factor = -h.lr * sqrt(1 - power(h.beta2, t)) / (1 - power(h.momentum, t)) / sqrt(second + h.eps);
      set_variance(component, second);
    }
    Sum<A> dd, qd;
    vector.each([&, from, fresh](int64_t i, auto tag) {
      using T = decltype(tag);
      const T d = fma(from.template old_buffer<T>(i), T(A(keep)), at<T>(fresh + i) * T(A(gain)));
      to(fresh + i, d);
      dd.add(d, d);
      qd.add(from.template weight<T>(i), d);
    });
    // The transported momentum is tangent but for rounding: what is radial in d is taken out.
    const Scalar radial = qd.value() * unit;
    const Scalar tangent = max(dd.value() - radial * radial, Scalar(0));
    const grassmann::Geodesic<Scalar> geodesic(sqrt(tangent), factor);
    Sum<A> after, across;
    vector.each([&, from, fresh](int64_t i, auto tag) {
      using T = decltype(tag);
      const T q = from.template weight<T>(i) * T(inverse);
      const T d = fma(q, T(A(-radial)), at<T>(fresh + i));
      const T point = fma(q, T(A(geodesic.cosine)), d * T(A(geodesic.along)));
      const T carried = fma(d, T(A(geodesic.cosine)), -(q * T(A(geodesic.turn))));
      from.to(from.w + i, point);
      to(fresh + i, carried);
      after.add(point, point);
      across.add(point, carried);
    });
    const Scalar final_square = after.value() > 0 ? after.value() : Scalar(1);
    const A off = A(across.value() / final_square);
    const A shrink = A(1 / sqrt(final_square));
    vector.each([from, fresh, off, shrink](int64_t i, auto tag) {
      using T = decltype(tag);
      const T point = from.template weight<T>(i);
      if (from.momentum.buffered) from.to(from.m + i, fma(point, T(-off), at<T>(fresh + i)));
      from.to(from.w + i, point * T(shrink));
    });
    vector.store_weight();
    vector.store_momentum();
    return true;
  }
};

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
