// Euclidean groups, element by element: torch.optim.SGD to the bit, or with the step size of the group's norm.
#pragma once

#include "cuda/reduce.cuh"
#include "manifolds/euclidean.h"

namespace mk {
namespace cuda {

// Elements [first, first + count) of a tile, counted over the components of its group.
template <class R>
class Elements {
  const Tables& t;
  const Group& g;
  const Tile& tile;
  const Tensor& tensor;
  const Addressing& geometry;
  const Rules<R> rules;

  // What is stepped along; m becomes the new buffer.
  template <class S>
  MK_DEVICE R direction(R w, R grad, R& m) const {
    grad = rules.gradient(w, grad);
    if (rules.momentum.buffered) m = as_stored<S>(rules.momentum.buffer(grad, m));
    return rules.momentum.direction(grad, m);
  }

  struct Address {
    int64_t weight, grad;
  };
  MK_DEVICE Address address(int64_t i) const {
    if (g.packed) return {i + g.first * geometry.elements(), i + g.first * geometry.elements()};
    const Divided at(i, geometry.elements(), geometry.inverse_elements);
    const int64_t component = component_of(t, g, at.quotient), e = at.rest;
    return {component_offset(geometry, geometry.weight_stride, component) +
                offset_over(geometry, geometry.weight_stride, geometry.batch_dims, geometry.dims, e),
            component_offset(geometry, geometry.grad_stride, component) +
                offset_over(geometry, geometry.grad_stride, geometry.batch_dims, geometry.dims, e)};
  }

  // f(w, direction) over all elements; with Write, w and the buffer are stored.
  template <bool Write, class F>
  MK_DEVICE void each(const F& f) const {
    with_storage<R>(g.storage, [&](auto s) {
      using S = decltype(s);
      constexpr int size = Chunk<S>::size;
      S* w = static_cast<S*>(tensor.weight);
      S* m = static_cast<S*>(tensor.momentum);
      const S* grads = static_cast<const S*>(tensor.grad);
      const bool buffered = rules.momentum.buffered, old = buffered && !rules.momentum.first;
      int64_t done = 0;
      const Address start = address(tile.first);
      if (g.packed) {
        // Whatever the addresses, a thread has the same elements, so that sums have the same bits.
        const bool aligned = is_aligned(w + start.weight) && is_aligned(grads + start.grad) &&
                             (!buffered || is_aligned(m + start.weight));
        done = tile.count / size * size;
        for (int64_t i = int64_t(threadIdx.x) * size; i < done; i += int64_t(blockDim.x) * size) {
          Chunk<S> weight = load_chunk(w + start.weight + i, aligned), buffer{};
          const Chunk<S> grad = load_chunk(grads + start.grad + i, aligned);
          if (old) buffer = load_chunk(m + start.weight + i, aligned);
          MK_UNROLL
          for (int j = 0; j < size; j++) {
            R x = real(weight.number[j]), y = real(buffer.number[j]);
            const R d = direction<S>(x, real(grad.number[j]), y);
            f(x, d);
            put(&weight.number[j], x);
            put(&buffer.number[j], y);
          }
          if constexpr (Write) {
            store_chunk(w + start.weight + i, weight, aligned);
            if (buffered) store_chunk(m + start.weight + i, buffer, aligned);
          }
        }
      }
#pragma unroll 1
      for (int64_t i = done + threadIdx.x; i < tile.count; i += blockDim.x) {
        const Address at = address(tile.first + i);
        R x = real(w[at.weight]), y = old ? R(real(m[at.weight])) : R(0);
        const R d = direction<S>(x, real(grads[at.grad]), y);
        f(x, d);
        if constexpr (Write) {
          put(w + at.weight, x);
          if (buffered) put(m + at.weight, y);
        }
      }
    });
  }

 public:
  MK_DEVICE Elements(const Tables& t, const Tile& tile)
      : t(t),
        g(t.groups[tile.group]),
        tile(tile),
        tensor(t.tensors[g.parameter]),
        geometry(t.geometries[g.geometry]),
        rules(t, g) {}

  // The sum of the squares of the directions, in double; NaN where a number is not finite. For all threads.
  MK_DEVICE double measure() const {
    double sum = 0;
    bool finite = true;
    each<false>([&](R w, R d) {
      sum = fma(double(d), double(d), sum);
      finite = finite && magnitude(w) < Range<R>::beyond && magnitude(d) < Range<R>::beyond;
    });
    return Block::sum(finite ? sum : double(__builtin_nan("")));
  }

  MK_DEVICE void step(double square) const {
    const StepSize<double> step_size = step_size_of<double>(t, g);
    const bool leads = tile.first == 0 && threadIdx.x == 0, finite = square == square;
    if (leads && t.norms && g.norm >= 0)
      t.norms[g.norm] = finite ? sqrt(square) : g.bounded && !g.individual ? 0 : square;
    if (g.bounded && !finite) {
      if (leads) count_nonfinite(t, g, 1);
      return;
    }
    const R minus_step = R(-step_size(square));
    each<true>([&](R& w, R d) { w = euclidean::step(w, d, minus_step); });
  }
};

template <class R, Pass pass>
__global__ void __launch_bounds__(block_threads, 3) elements(Tables t, const Tile* tiles) {
  if (is_skipped(t)) return;
  const Tile tile = tiles[blockIdx.x];
  const Elements<R> work(t, tile);
  if constexpr (pass == Pass::measure) {
    const double square = work.measure();
    if (threadIdx.x == 0) t.partials[tile.partial] = square;
  } else {
    const Group& g = t.groups[tile.group];
    double square = 0;
    if (g.partials) {
      square = total_of(t, g);
    } else if (g.bounded || (t.norms && g.norm >= 0)) {
      square = work.measure();
    }
    work.step(square);
  }
}

}  // namespace cuda
}  // namespace mk
