// Euclidean groups: torch.optim.SGD, elementwise, or the same direction with the step size of the group's norm.
#pragma once

#include "cpu/rows.h"
#include "cpu/tile.h"
#include "manifolds/euclidean.h"
#include "size.h"

namespace mk {
namespace MK_ISA {
namespace {

template <class R>
class Elements {
  const Job& job;
  const Momentum<R> momentum;
  const StepSize<double> step_size;

  // What is stepped along; m, ignored where there is none, becomes the new buffer.
  template <class V>
  MK_FN V direction(V w, V g, V& m) const {
    g = momentum.gradient(w, g);
    if (momentum.buffered) m = as_stored(job.storage, momentum.buffer(g, m));
    return momentum.direction(g, m);
  }

  // f(w, g, m) over elements that lie one after the other; Write: w and m are stored.
  template <bool Write, class S, class F>
  MK_FN void consecutive(S* w, S* m, const S* g, int64_t count, const F& f) const {
    sweep<R>(count, [&](int64_t i, auto tag) {
      using V = decltype(tag);
      V x = get_as<V>(w + i), y = V(R(0));
      if (momentum.buffered && !momentum.first) y = get_as<V>(m + i);
      f(x, get_as<V>(g + i), y);
      if (Write && momentum.buffered) put(m + i, y);
      if (Write) put(w + i, x);
    });
  }

  // The same over elements [begin, end) of a dense span.
  template <bool Write, class F>
  MK_FN void dense(const Span& span, int64_t begin, int64_t end, const F& f) const {
    with_storage<R>(job.storage, [&](auto s) {
      using S = decltype(s);
      consecutive<Write>(static_cast<S*>(job.weight) + span.weight + begin,
                         job.momentum ? static_cast<S*>(job.momentum) + span.weight + begin : nullptr,
                         static_cast<const S*>(job.grad) + span.grad + begin, end - begin, f);
    });
  }

  // Any strides.
  template <bool Write, class F>
  MK_FN void scattered(const Span& span, const F& f) const {
    const Geometry& geometry = *job.geometry;
    int64_t index[max_dims] = {}, weight = span.weight, grad = span.grad;
    for (int64_t i = 0; i < span.length; i++) {
      R x = get<R>(job.storage, job.weight, weight), y = R(0);
      if (momentum.buffered && !momentum.first) y = get<R>(job.storage, job.momentum, weight);
      f(x, get<R>(job.storage, job.grad, grad), y);
      if (Write && momentum.buffered) set(job.storage, job.momentum, weight, y);
      if (Write) set(job.storage, job.weight, weight, x);
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

  template <bool Write, class F>
  MK_FN void each(const Span& span, int64_t begin, int64_t end, const F& f) const {
    if (span.dense) {
      dense<Write>(span, begin, end, f);
    } else {
      scattered<Write>(span, f);
    }
  }

  struct Measured {
    double square;  // of the direction
    bool finite;    // direction and weight
  };

  struct Measuring {
    Sum<R> square, off;  // a product with zero is NaN where a number is not finite
    Measured value() const { return {square.value(), off.value() == 0}; }
  };
  auto measuring(Measuring& of) const {
    return [&](auto w, auto g, auto m) {
      using V = decltype(w);
      const V d = direction(w, g, m);
      of.square.add(d, d);
      of.off.add(d, V(R(0)));
      of.off.add(w, V(R(0)));
    };
  }
  auto moving(double step) const {
    return [this, minus_step = R(-step)](auto& w, auto g, auto& m) {
      using V = std::remove_reference_t<decltype(w)>;
      w = euclidean::step(w, direction(w, g, m), V(minus_step));
    };
  }

  // Elements [begin, end) of a dense span, or all of another.
  __attribute__((noinline)) Measured measure(const Span& span, int64_t begin, int64_t end) const {
    Measuring measured;
    each<false>(span, begin, end, measuring(measured));
    return measured.value();
  }

  MK_FN void move(const Span& span, int64_t begin, int64_t end, double step) const {
    each<true>(span, begin, end, moving(step));
  }

  // Listed components that are smaller than a few registers: a tile of them is copied and done as one vector.
  using Memory = TileMemory<R, 1>;
  int tile_width() const { return int(tile_elements / job.geometry->elements()); }
  bool in_tiles() const {
    return std::is_same<R, float>::value && job.listed && job.geometry->elements() <= short_vector;
  }
  // Copies components [k, k + count); returns how many numbers they have.
  int bring(int64_t k, int count, Memory& memory) const {
    const Dynamic size{int(job.geometry->n), int(job.geometry->p)};
    copy<R, Dynamic, false>(job, job.weight, false, k, count, size, nullptr, memory.w);
    copy<R, Dynamic, false>(job, const_cast<void*>(job.grad), true, k, count, size, nullptr, memory.g);
    if (momentum.buffered && !momentum.first)
      copy<R, Dynamic, false>(job, job.momentum, false, k, count, size, nullptr, memory.m);
    return count * int(job.geometry->elements());
  }
  void put_back(int64_t k, int count, const Memory& memory) const {
    const Dynamic size{int(job.geometry->n), int(job.geometry->p)};
    copy<R, Dynamic, true>(job, job.weight, false, k, count, size, nullptr, const_cast<R*>(memory.w));
    if (momentum.buffered)
      copy<R, Dynamic, true>(job, job.momentum, false, k, count, size, nullptr, const_cast<R*>(memory.m));
  }

 public:
  explicit Elements(const Job& job) : job(job), momentum(momentum_of<R>(job)), step_size(step_size_of<double>(job)) {}

  void whole(int64_t begin, int64_t end, Partial* out) const {
    if (!job.bounded && !job.norms) return second(begin, end, job.hyper.lr, nullptr);
    for (int64_t k = begin; k < end; k++) {
      const Span span = span_of(job, k);
      const Measured measured = measure(span, 0, span.length);
      const bool left = job.bounded && !measured.finite;
      if (job.norms) job.norms[k] = measured.finite ? __builtin_sqrt(measured.square) : __builtin_nan("");
      if (!left) move(span, 0, span.length, step_size(measured.square));
      out->nonfinite += left;
    }
  }

  void first(int64_t begin, int64_t end, Partial* out, uint8_t* skipped) const {
    if (job.in_pieces()) {
      const Measured measured = measure(span_of(job, 0), begin, end);
      out->square += measured.square;
      out->nonfinite += !measured.finite;
      return;
    }
    for (int64_t k = begin; k < end; k++) {
      if (in_tiles()) {
        Memory memory;
        const int count = int(end - k < tile_width() ? end - k : tile_width());
        Measuring tile;
        consecutive<false>(memory.w, memory.m, memory.g, bring(k, count, memory), measuring(tile));
        if (tile.value().finite) {
          out->square += tile.value().square;
          k += count - 1;
          continue;
        }
      }
      const Span span = span_of(job, k);
      const Measured measured = measure(span, 0, span.length);
      if (measured.finite) {
        out->square += measured.square;
      } else {
        out->nonfinite++;
        skipped[k] = 1;
      }
    }
  }

  void second(int64_t begin, int64_t end, double step, const uint8_t* skipped) const {
    if (job.in_pieces()) return move(span_of(job, 0), begin, end, step);
    for (int64_t k = begin; k < end; k++) {
      if (in_tiles() && !skipped) {
        Memory memory;
        const int count = int(end - k < tile_width() ? end - k : tile_width());
        consecutive<true>(memory.w, memory.m, memory.g, bring(k, count, memory), moving(step));
        put_back(k, count, memory);
        k += count - 1;
        continue;
      }
      if (skipped && skipped[k]) continue;
      const Span span = span_of(job, k);
      move(span, 0, span.length, step);
    }
  }
};

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
