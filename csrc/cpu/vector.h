// One long vector, its elements in lanes: in place where they lie one after the other, else copied to scratch and back.
#pragma once

#include <type_traits>

#include "cpu/rows.h"

namespace mk {
namespace MK_ISA {
namespace {

// What a loop over elements reads and writes, by value, so that no store can have changed it. R is the arithmetic type
// of the storage, A the one computed in: R, or the next wider one. S is what the elements are kept as while they are
// worked on: the storage type in place, A in copies.
template <class R, class A, class S>
struct VectorElements {
  static constexpr bool wide = sizeof(A) != sizeof(R);

  S *w, *m;
  const S* g;
  Momentum<A> momentum;
  Momentum<R> narrow;
  Storage storage;
  bool stored;  // m is the new buffer already

  template <class V>
  MK_FN static V at(const S* p) {
    if constexpr (std::is_same<S, A>::value) {
      return MK_ISA::at<V>(p);
    } else {
      return get_as<V>(p);
    }
  }
  template <class V>
  MK_FN static void to(S* p, V x) {
    if constexpr (std::is_same<S, A>::value) {
      MK_ISA::to(p, x);
    } else {
      put(p, x);
    }
  }

  template <class V>
  MK_FN V weight(int64_t i) const {
    return at<V>(w + i);
  }
  // Before this step; 0 before the first.
  template <class V>
  MK_FN V old_buffer(int64_t i) const {
    return momentum.first || !momentum.buffered ? V(A(0)) : at<V>(m + i);
  }
  // Divided; a quotient is rounded to R on the wide path, too.
  template <class V>
  MK_FN V gradient(int64_t i) const {
    const V grad = at<V>(g + i);
    if constexpr (wide) {
      return V(narrow.gradient(R(0), R(grad)));
    } else {
      return momentum.gradient(V(A(0)), grad);
    }
  }
  // As it will be stored.
  template <class V>
  MK_FN V rounded(V x) const {
    if constexpr (wide) {
      return V(as_stored(storage, R(x)));
    } else if constexpr (sizeof(S) == 2) {
      S kept[sizeof(V) / sizeof(R)];
      put(kept, x);
      return get_as<V>(kept);
    } else {
      return as_stored(storage, x);
    }
  }
  // The new buffer. That of the wide path is the narrow one's, rounding included.
  template <class V>
  MK_FN V buffer(int64_t i, V grad) const {
    if (stored) return at<V>(m + i);
    const V old = old_buffer<V>(i);
    if constexpr (wide) {
      return rounded(V(narrow.buffer(R(grad), R(old))));
    } else {
      return rounded(momentum.buffer(grad, old));
    }
  }
  // What is stepped along, and the new buffer, where there is one.
  template <class V>
  struct Direction {
    V d, buffer;
  };
  template <class V>
  MK_FN Direction<V> direction(int64_t i) const {
    return direction<V>(i, i);
  }
  // The same where element i of the gradient lies at j.
  template <class V>
  MK_FN Direction<V> direction(int64_t i, int64_t j) const {
    if (stored && momentum.buffer_is_direction()) {
      const V kept = at<V>(m + i);
      return {kept, kept};
    }
    const V grad = gradient<V>(j);
    if (!momentum.buffered) return {grad, grad};
    const V kept = buffer(i, grad);
    return {momentum.direction(grad, kept), kept};
  }
};

template <class R, class A, class S>
class Vector {
  const Span span;
  const bool copied;
  A* const scratch;
  S *w, *m;
  const S* g;

 public:
  using Number = A;
  using Scalar = decltype(double{} + A{});
  static constexpr bool wide = sizeof(A) != sizeof(R);
  // Sums that are quick and those that hold whatever the range; for most types they are the same.
  using Quick = typename std::conditional<std::is_same<A, float>::value, QuickSum, Sum<A>>::type;

  const Job& job;
  const int64_t n;
  const Scalar scale;

  // `scratch`: vector_scratch arrays of n elements, the first three for copies, if there are to be any. `stored`: the
  // buffer is the new one already.
  Vector(const Job& job, const Span& span, Scalar scale, A* scratch, bool copied, bool stored)
      : span(span), copied(copied), scratch(scratch), job(job), n(span.length), scale(scale) {
    const Geometry& geometry = *job.geometry;
    w = static_cast<S*>(job.weight) + span.weight;
    g = static_cast<const S*>(job.grad) + span.grad;
    m = job.momentum ? static_cast<S*>(job.momentum) + span.weight : nullptr;
    if constexpr (std::is_same<S, A>::value) {
      if (!copied) return;
      w = scratch;
      g = scratch + n;
      m = scratch + 2 * n;
      gather<A, R>(job, span, job.weight, geometry.weight_stride, span.weight, w);
      gather<A, R>(job, span, job.grad, geometry.grad_stride, span.grad, scratch + n);
      if (job.momentum && (stored || !job.first_step))
        gather<A, R>(job, span, job.momentum, geometry.weight_stride, span.weight, m);
    }
  }

  VectorElements<R, A, S> elements(bool stored) const {
    return {w, m, g, momentum_of<A>(job), momentum_of<R>(job), job.storage, stored};
  }
  A* spare() const { return scratch + 3 * n; }

  // Copies go back where they came from.
  void store_weight() const {
    if constexpr (std::is_same<S, A>::value)
      if (copied) scatter<A, R>(job, span, job.weight, w);
  }
  void store_momentum() const {
    if constexpr (std::is_same<S, A>::value)
      if (copied && job.momentum) scatter<A, R>(job, span, job.momentum, m);
  }

  // f(i, tag) over all elements, with sums to fold; the wide path goes one by one.
  template <class F, class... Sums>
  MK_FN void each(const F& f, Sums&... sums) const {
    if constexpr (wide) {
      for (int64_t i = 0; i < n; i++) f(i, A{});
    } else {
      sweep_sums<A>(n, f, sums...);
    }
  }

  // Numbers beyond this would be stored as infinity.
  Scalar largest() const {
    return job.storage == Storage::float16 ? Scalar(largest_float16) : Scalar(Limits<R>::largest);
  }
  bool is_within(Scalar x) const { return x <= largest() && x >= -largest(); }
  static bool is_finite(A x) { return Scalar(abs(x)) <= Scalar(Limits<R>::largest); }
  // Squares up to here can be computed with in A.
  bool is_fast(Scalar square) const {
    const Scalar limit = job.storage == Storage::float16 ? largest() * largest() : Scalar(Limits<R>::huge_square);
    return wide || square <= limit;
  }
};

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
