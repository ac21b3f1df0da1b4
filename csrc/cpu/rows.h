// Long vectors as consecutive numbers of the arithmetic type: in place where they lie so, else copied to scratch and
// back.
#pragma once

#include <type_traits>

#include "cpu/job.h"
#include "cpu/job_rules.h"
#include "cpu/storage.h"

namespace mk {
namespace MK_ISA {
namespace {

template <class R>
constexpr bool packable = sizeof(R) <= 8;

// f(i, tag) over [0, n), tag telling the type that element i, or the pack from i on, is to be loaded as.
template <class R, class F>
MK_FN void sweep(int64_t n, const F& f) {
  int64_t i = 0;
  if constexpr (packable<R>) {
    for (; i + Pack<R>::lanes <= n; i += Pack<R>::lanes) f(i, Pack<R>{});
  }
  for (; i < n; i++) f(i, R{});
}

template <class V, class R>
MK_FN V at(const R* p) {
  if constexpr (sizeof(V) == sizeof(R)) {
    return *p;
  } else {
    return V::load(p);
  }
}
template <class V, class R>
MK_FN void to(R* p, V x) {
  if constexpr (sizeof(V) == sizeof(R)) {
    *p = x;
  } else {
    x.store(p);
  }
}

// A sum of products in double (long double for long double), in an order that depends on the length alone.
template <class R>
class Sum {
  using Scalar = decltype(double{} + R{});
  Scalar rest = 0;
  struct None {};
  using Wide = typename std::conditional<packable<R>, Pack<double>, None>::type;
  Wide low, high;

 public:
  MK_FN Sum() {
    if constexpr (packable<R>) low = high = Pack<double>(0.0);
  }
  MK_FN void add(R a, R b) { rest = fma(Scalar(a), Scalar(b), rest); }
  template <class Q>
  MK_FN void add(Pack<Q> a, Pack<Q> b) {
    if constexpr (sizeof(Q) == 8) {
      low = fma(a, b, low);
    } else {
      low = fma(lower(a), lower(b), low);
      high = fma(upper(a), upper(b), high);
    }
  }
  MK_FN void fold() {}
  MK_FN Scalar value() const {
    if constexpr (packable<R>) return total(low) + total(high) + rest;
    return rest;
  }
};

// The same of floats: up to `folding` products a lane are added in float before they go on in double. Good to a few
// roundings of a float, where the sum is `in_float_range`.
class QuickSum {
  Sum<float> folded;
  Pack<float> now{0};

 public:
  MK_FN void add(float a, float b) { folded.add(a, b); }
  MK_FN void add(Pack<float> a, Pack<float> b) { now = fma(a, b, now); }
  MK_FN void fold() {
    folded.add(now, Pack<float>(1));
    now = Pack<float>(0);
  }
  MK_FN double value() const { return folded.value(); }
};

// No product that counts is lost below the range of floats, and none is beyond it.
MK_FN bool in_float_range(double sum_of_squares) { return sum_of_squares >= 1e-24 && sum_of_squares <= 1e30; }

constexpr int folding = 16;

// sweep() with sums that are to fold.
template <class R, class F, class... Sums>
MK_FN void sweep_sums(int64_t n, const F& f, Sums&... sums) {
  int64_t i = 0;
  if constexpr (packable<R>) {
    constexpr int lanes = Pack<R>::lanes;
    for (; i + folding * lanes <= n; i += folding * lanes) {
      for (int64_t j = i; j < i + folding * lanes; j += lanes) f(j, Pack<R>{});
      (sums.fold(), ...);
    }
    for (; i + lanes <= n; i += lanes) f(i, Pack<R>{});
    (sums.fold(), ...);
  }
  for (; i < n; i++) f(i, R{});
}

// Where vector v of a job starts and how its elements lie: the dimensions [from, to) of the geometry.
struct Span {
  int64_t weight, grad, length;
  int from, to;
  bool dense;
};

MK_FN bool by_columns(const Job& job) { return job.manifold == ManifoldCode::oblique; }

MK_FN Span span_of(const Job& job, int64_t vector) {
  const Geometry& g = *job.geometry;
  const bool columns = by_columns(job);
  const int64_t component = job.component(columns ? vector / g.p : vector);
  Span span{offset_of(g, g.weight_stride, component),
            offset_of(g, g.grad_stride, component),
            columns ? g.n : g.n * g.p,
            g.batch_dims,
            columns ? g.batch_dims + g.row_dims : g.dims,
            columns ? g.dense_columns : g.dense};
  if (columns) {
    int64_t column = vector % g.p;
    for (int d = g.dims - 1; d >= g.batch_dims + g.row_dims; d--) {
      span.weight += column % g.size[d] * g.weight_stride[d];
      span.grad += column % g.size[d] * g.grad_stride[d];
      column /= g.size[d];
    }
  }
  return span;
}

// f(i, offset) over the elements of a span, in the order of its dimensions.
template <class F>
void walk(const Geometry& g, const Span& span, const int64_t* stride, int64_t start, const F& f) {
  int64_t index[max_dims] = {};
  int64_t offset = start;
  for (int64_t i = 0; i < span.length; i++) {
    f(i, offset);
    for (int d = span.to - 1; d >= span.from; d--) {
      offset += stride[d];
      if (++index[d] < g.size[d]) break;
      offset -= g.size[d] * stride[d];
      index[d] = 0;
    }
  }
}

template <class A, class R>
void gather(const Job& job, const Span& span, const void* base, const int64_t* stride, int64_t start, A* into) {
  with_storage<R>(job.storage, [&](auto s) {
    using S = decltype(s);
    const S* memory = static_cast<const S*>(base);
    if constexpr (sizeof(A) == sizeof(R)) {
      if (span.dense) {
        sweep<R>(span.length, [&](int64_t i, auto tag) { to(into + i, get_as<decltype(tag)>(memory + start + i)); });
        return;
      }
    }
    walk(*job.geometry, span, stride, start, [&](int64_t i, int64_t offset) { into[i] = A(real(memory[offset])); });
  });
}

template <class A, class R>
void scatter(const Job& job, const Span& span, void* base, const A* from) {
  with_storage<R>(job.storage, [&](auto s) {
    using S = decltype(s);
    S* memory = static_cast<S*>(base);
    if constexpr (sizeof(A) == sizeof(R)) {
      if (span.dense) {
        sweep<R>(span.length, [&](int64_t i, auto tag) { put(memory + span.weight + i, at<decltype(tag)>(from + i)); });
        return;
      }
    }
    walk(*job.geometry, span, job.geometry->weight_stride, span.weight,
         [&](int64_t i, int64_t offset) { put(memory + offset, R(from[i])); });
  });
}

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
