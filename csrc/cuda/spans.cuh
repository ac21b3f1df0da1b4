// Vectors in memory, and sweeps over their elements by a team of threads, 16 bytes at a time where they lie so.
//
// A vector is read once from memory: later sweeps of the same threads over it find it in the cache.
#pragma once

#include "cuda/reduce.cuh"

namespace mk {
namespace cuda {

// Vector `number` of a group: a component, or a column of one.
template <class R, class T>
class Span {
  const Tables& t;
  const Group& g;
  const Addressing& geometry;
  const Tensor& tensor;
  int64_t weight, grad;
  int from, to;  // its dimensions

 public:
  int64_t length, component, position;  // position: of its component in the group

  MK_DEVICE Span(const Tables& t, const Group& g, int64_t number)
      : t(t), g(g), geometry(t.geometries[g.geometry]), tensor(t.tensors[g.parameter]) {
    const bool columns = g.manifold == ManifoldCode::oblique;
    position = columns ? number / geometry.p : number;
    component = component_of(t, g, position);
    weight = component_offset(geometry, geometry.weight_stride, component);
    grad = component_offset(geometry, geometry.grad_stride, component);
    from = geometry.batch_dims;
    to = geometry.dims;
    length = geometry.n * geometry.p;
    if (columns) {
      to = geometry.batch_dims + geometry.row_dims;
      length = geometry.n;
      const int64_t column = number - position * geometry.p;
      weight += offset_over(geometry, geometry.weight_stride, to, geometry.dims, column);
      grad += offset_over(geometry, geometry.grad_stride, to, geometry.dims, column);
    }
  }

  MK_DEVICE R scale() const { return R(t.scales[g.scale + position * g.scale_stride]); }

  // f(i, w, g, m, storage) over the elements of this thread, storage being a number of the storage type. What is not
  // asked for is zero; with Write, what f leaves in w and m is stored.
  template <bool Write, class F>
  MK_DEVICE void each(bool read_grad, bool read_momentum, bool write_weight, bool write_momentum, const F& f) const {
    with_storage<R>(g.storage, [&](auto s) {
      using S = decltype(s);
      constexpr int size = Chunk<S>::size;
      S* w = static_cast<S*>(tensor.weight) + weight;
      S* m = static_cast<S*>(tensor.momentum) + weight;
      const S* grads = static_cast<const S*>(tensor.grad) + grad;
      const bool use_momentum = read_momentum || (Write && write_momentum);
      int64_t done = 0;
      if (g.packed) {
        // Whatever the addresses, a thread has the same elements, so that sums have the same bits.
        const bool aligned = is_aligned(w) && is_aligned(grads) && (!use_momentum || is_aligned(m));
        done = length / size * size;
        for (int64_t i = int64_t(T::rank()) * size; i < done; i += T::size * size) {
          Chunk<S> weights = load_chunk(w + i, aligned), momenta{}, gradients{};
          if (read_grad) gradients = load_chunk(grads + i, aligned);
          if (read_momentum) momenta = load_chunk(m + i, aligned);
          MK_UNROLL
          for (int j = 0; j < size; j++) {
            R x = real(weights.number[j]), y = real(momenta.number[j]);
            f(i + j, x, R(real(gradients.number[j])), y, s);
            if constexpr (Write) {
              put(&weights.number[j], x);
              put(&momenta.number[j], y);
            }
          }
          if (Write && write_weight) store_chunk(w + i, weights, aligned);
          if (Write && write_momentum) store_chunk(m + i, momenta, aligned);
        }
      }
#pragma unroll 1
      for (int64_t i = done + T::rank(); i < length; i += T::size) {
        const int64_t at = g.packed ? i : offset_over(geometry, geometry.weight_stride, from, to, i);
        R x = real(w[at]), y = read_momentum ? R(real(m[at])) : R(0), gradient = R(0);
        if (read_grad) gradient = real(grads[g.packed ? i : offset_over(geometry, geometry.grad_stride, from, to, i)]);
        f(i, x, gradient, y, s);
        if (Write && write_weight) put(w + at, x);
        if (Write && write_momentum) put(m + at, y);
      }
    });
  }
};

}  // namespace cuda
}  // namespace mk
