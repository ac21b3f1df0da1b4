// Euclidean groups: torch.optim.SGD, elementwise.
#pragma once

#include "cpu/rows.h"
#include "manifolds/euclidean.h"

namespace mk {
namespace MK_ISA {
namespace {

template <class R>
class Elements {
  const Job& job;
  const Momentum<R> momentum;
  const R minus_lr;

  // `v` weights w with gradients g and buffers m (ignored where there are none).
  template <class V>
  MK_FN void update(V& w, V g, V& m) const {
    g = momentum.gradient(w, g);
    if (momentum.buffered) m = as_stored(job.storage, momentum.buffer(g, m));
    w = euclidean::step(w, momentum.direction(g, m), V(minus_lr));
  }

 public:
  explicit Elements(const Job& job) : job(job), momentum(momentum_of<R>(job)), minus_lr(R(-job.hyper.lr)) {}

  // Elements [begin, end) of weight, buffer and gradient that lie one after the other.
  void run(int64_t weight, int64_t grad, int64_t begin, int64_t end) const {
    with_storage<R>(job.storage, [&](auto s) {
      using S = decltype(s);
      S* w = static_cast<S*>(job.weight) + weight + begin;
      S* m = job.momentum ? static_cast<S*>(job.momentum) + weight + begin : nullptr;
      const S* g = static_cast<const S*>(job.grad) + grad + begin;
      sweep<R>(end - begin, [&](int64_t i, auto tag) {
        using V = decltype(tag);
        V x = get_as<V>(w + i), y = V(R(0));
        if (momentum.buffered && !momentum.first) y = get_as<V>(m + i);
        update(x, get_as<V>(g + i), y);
        if (momentum.buffered) put(m + i, y);
        put(w + i, x);
      });
    });
  }

  // Any strides.
  void scattered(const Span& span) const {
    const Geometry& geometry = *job.geometry;
    int64_t index[max_dims] = {}, weight = span.weight, grad = span.grad;
    for (int64_t i = 0; i < span.length; i++) {
      R x = get<R>(job.storage, job.weight, weight), y = R(0);
      if (momentum.buffered && !momentum.first) y = get<R>(job.storage, job.momentum, weight);
      update(x, get<R>(job.storage, job.grad, grad), y);
      if (momentum.buffered) set(job.storage, job.momentum, weight, y);
      set(job.storage, job.weight, weight, x);
      for (int d = span.to - 1; d >= span.from; d--) {
        weight += geometry.weight_stride[d];
        grad += geometry.grad_stride[d];
        if (++index[d] < geometry.size[d]) break;
        weight -= geometry.size[d] * geometry.weight_stride[d];
        grad -= geometry.size[d] * geometry.grad_stride[d];
        index[d] = 0;
      }
    }
  }

  // Elements of a single dense component, or components, [begin, end).
  void step(int64_t begin, int64_t end) const {
    if (job.geometry->count == 1 && job.geometry->dense) {
      const Span span = span_of(job, 0);
      return run(span.weight, span.grad, begin, end);
    }
    for (int64_t k = begin; k < end; k++) {
      const Span span = span_of(job, k);
      if (span.dense) {
        run(span.weight, span.grad, 0, span.length);
      } else {
        scattered(span);
      }
    }
  }
};

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
