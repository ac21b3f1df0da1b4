// FG-SGD of one long vector on its sphere: sums in a first sweep, from which the norm of the projection and that after
// the step follow in closed form, and w and the buffer in a second, which finds everything in the cache.
#pragma once

#include "cpu/vector.h"
#include "manifolds/sphere.h"

namespace mk {
namespace MK_ISA {
namespace {

template <class V>
class SphereVector {
  using A = typename V::Number;
  using Scalar = typename V::Scalar;
  const V& vector;
  const bool stored;
  struct {
    Scalar qq, qm, square;
  } sums;  // as in VectorState, where the squares of doubles would overflow

  // False where squares leave the range of A.
  template <class Sum>
  bool measure_by(Scalar least_tangent) {
    const auto from = vector.elements(stored);
    Sum qq, qm, dd;
    vector.each(
        [&, from](int64_t i, auto tag) {
          using T = decltype(tag);
          const T w = from.template weight<T>(i), d = from.template direction<T>(i).d;
          qq.add(w, w);
          qm.add(w, d);
          dd.add(d, d);
        },
        qq, qm, dd);
    const Scalar square = dd.value(), scale = vector.scale;
    const Scalar inner = qm.value() / scale, norm = qq.value() / (scale * scale);
    if (std::is_same<Sum, QuickSum>::value && !(in_float_range(square) && in_float_range(qq.value()))) return false;
    if (!(vector.is_fast(square) && vector.is_fast(qq.value()))) return false;
    Scalar tangent = sphere::tangent_square(norm, inner, square);
    if (tangent < square * least_tangent) tangent = tangent_by_element(inner);
    sums = {norm, inner, tangent};
    return true;
  }

  __attribute__((noinline)) Scalar tangent_by_element(Scalar inner) const {
    const auto from = vector.elements(stored);
    const A inverse = A(1 / vector.scale), qm = A(inner);
    Sum<A> sum;
    vector.each([&, from](int64_t i, auto tag) {
      using T = decltype(tag);
      const T x = sphere::rgrad(from.template weight<T>(i) * T(inverse), from.template direction<T>(i).d, T(qm));
      sum.add(x, x);
    });
    return sum.value();
  }

 public:
  SphereVector(const V& vector, bool stored) : vector(vector), stored(stored) {}

  // Whether weight, gradient and new buffer are finite.
  bool finite() const {
    const auto from = vector.elements(stored);
    for (int64_t i = 0; i < vector.n; i++) {
      const auto [d, buffer] = from.template direction<A>(i);
      const A grad = stored ? A(0) : from.template gradient<A>(i);
      if (!V::is_finite(grad) || !vector.is_within(buffer) || !vector.is_within(from.template weight<A>(i)))
        return false;
    }
    return true;
  }

  // Sums. False where the vector must be left to the wide type.
  bool measure(VectorState& state) {
    using Quick = typename V::Quick;
    constexpr bool quick = !std::is_same<Quick, Sum<A>>::value;
    // Sums of floats are good for closed forms that lose four bits.
    const bool measured = quick && measure_by<Quick>(Scalar(1) / 16);
    if (!measured && !measure_by<Sum<A>>(Scalar(sizeof(A) == 4 ? 1e-6 : 0.25))) return false;
    state.qq = double(sums.qq);
    state.qm = double(sums.qm);
    state.square = double(sums.square);
    return true;
  }

  // Those of measure(), instead of calling it.
  void take(const VectorState& state) { sums = {state.qq, state.qm, state.square}; }

  bool short_enough(Scalar step) const {
    const Scalar v = step / vector.scale;
    return V::wide || v * v * sums.square <= Scalar(Limits<A>::huge_square);
  }

  void store_momentum() const {
    const auto from = vector.elements(false);
    if (!from.momentum.buffered) return;
    vector.each([from](int64_t i, auto tag) {
      using T = decltype(tag);
      from.to(from.m + i, from.buffer(i, from.template gradient<T>(i)));
    });
    vector.store_momentum();
  }

  // W <- R_W(-step xi), and the buffer, where it is not stored yet.
  void retract(Scalar step) const {
    const Scalar v = -step / vector.scale, qq = sums.qq, qm = sums.qm, square = sums.square;
    const auto arc = vector.job.retraction == Retraction::exp ? sphere::exp(v, square) : sphere::projection(v);
    const auto end = sphere::combination(arc, qq, qm, square);
    const A alpha = A(end.a), beta = A(vector.scale * end.b);
    // Where the radial part of d is long against the result, the combination cancels: measure it and normalise once
    // more.
    const bool cancels = abs(arc.b * qm) > Scalar(0.5);
    const A factor = cancels ? A(normalisation(alpha, beta)) : A(1);
    const auto from = vector.elements(stored);
    const bool writes_buffer = from.momentum.buffered && !stored;
    vector.each([from, alpha, beta, factor, cancels, writes_buffer](int64_t i, auto tag) {
      using T = decltype(tag);
      const auto [d, buffer] = from.template direction<T>(i);
      T w = fma(from.template weight<T>(i), T(alpha), d * T(beta));
      if (cancels) w = w * T(factor);
      if (writes_buffer) from.to(from.m + i, buffer);
      from.to(from.w + i, w);
    });
    vector.store_weight();
    if (writes_buffer) vector.store_momentum();
  }

 private:
  __attribute__((noinline)) Scalar normalisation(A alpha, A beta) const {
    const auto from = vector.elements(stored);
    Sum<A> sum;
    vector.each([&, from](int64_t i, auto tag) {
      using T = decltype(tag);
      const T w = fma(from.template weight<T>(i), T(alpha), from.template direction<T>(i).d * T(beta));
      sum.add(w, w);
    });
    return sum.value() > 0 ? vector.scale / sqrt(sum.value()) : Scalar(1);
  }
};

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
