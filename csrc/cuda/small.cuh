// Small matrices, one to a thread, its elements in registers.
//
// A block takes as many matrices at a time as it has threads. Momentum needs no matrix structure: weights and gradients
// are read in the order of memory, 16 bytes at a time where they lie so, and W and the new momentum wait in shared
// memory for the thread that owns the matrix, rows apart by an odd number, so that no two lanes meet in a bank.
// channels_last weights are read element by element, neighbouring lanes being neighbours in memory.
#pragma once

#include "cpu/maps.h"
#include "cuda/reduce.cuh"

namespace mk {
namespace cuda {

constexpr int small_threads(int elements) { return elements <= 25 ? 128 : 64; }
constexpr int small_stride(int elements) { return elements | 1; }

// Blocks that a multiprocessor is to have room for: what bounds the registers of a thread, to 64 for 3 x 3 matrices.
// One lets the compiler take what it wants, where it would spill a few numbers for the sake of more threads; zero
// leaves it alone.
template <class Map>
constexpr bool is_by_qr = true;
template <Retraction retraction>
constexpr bool is_by_qr<StiefelMap<retraction>> = retraction == Retraction::qr;
template <class R, class Map>
constexpr int small_blocks(int elements, Pass pass) {
  // 4 x 2 takes more rotations than 3 x 3 and would spill, and so would the norms of 3 x 2 on a B200.
  const int room = elements == 6 && pass == Pass::measure ? 6 : elements == 8 ? 7 : 8;
  if (sizeof(R) == 4 && elements <= 9 && is_by_qr<Map>) return room;
  return pass == Pass::step && elements >= 56 ? 0 : 1;
}

// Dynamic shared memory of a block: where its matrices start, W, the momentum, and the gradient for nesterov.
template <class R>
constexpr size_t small_shared(int elements) {
  return size_t(small_threads(elements)) * (2 * sizeof(int64_t) + 3 * size_t(small_stride(elements)) * sizeof(R));
}

template <class R, class Map, int N, int P, Pass pass>
class Small {
  static constexpr int E = N * P, stride = small_stride(E), threads = small_threads(E);
  static constexpr bool steps = pass == Pass::step;
  using Size = Fixed<N, P>;

  const Tables& t;
  const Group& g;
  const Tile& tile;
  const Rules<R> rules;
  const bool stored;    // the first launch has stored the momentum
  const bool in_order;  // everything at hand lies at consecutive addresses of 16 bytes' alignment
  int64_t *const weight_at, *const grad_at;
  R *const w, *const b;  // W, and the momentum or the gradient where there is none
  R* const fresh;        // the gradient where the momentum looks ahead (nesterov)

  template <class S>
  MK_DEVICE S* weight_of() const {
    return static_cast<S*>(t.tensors[g.parameter].weight);
  }
  template <class S>
  MK_DEVICE S* momentum_of() const {
    return static_cast<S*>(t.tensors[g.parameter].momentum);
  }
  template <class S>
  MK_DEVICE const S* grad_of() const {
    return static_cast<const S*>(t.tensors[g.parameter].grad);
  }

  MK_DEVICE static int slot(int i) { return stride == E ? i : i / E * stride + i % E; }
  MK_DEVICE int weight_element(int e) const { return g.in_order ? e : int(t.element_offsets[g.weight_offset + e]); }
  MK_DEVICE int grad_element(int e) const { return g.in_order ? e : int(t.element_offsets[g.grad_offset + e]); }
  // The first element of matrix k of the tile, where all are packed.
  MK_DEVICE int64_t start(int k) const { return (g.first + tile.first + k) * E; }

  // f(slot, weight address, gradient address) over the elements of `count` matrices.
  template <class F>
  MK_DEVICE void each_address(int count, const F& f) const {
    if (g.in_lanes) {
      const int c = int(threadIdx.x);
      if (c < count)
        for (int e = 0; e < E; e++)
          f(c * stride + e, weight_at[c] + weight_element(e), grad_at[c] + grad_element(e), c);
      return;
    }
#pragma unroll 1
    for (int i = int(threadIdx.x); i < count * E; i += threads) {
      const int c = i / E, e = i % E;
      f(c * stride + e, weight_at[c] + weight_element(e), grad_at[c] + grad_element(e), c);
    }
  }

  MK_DEVICE bool ahead() const { return rules.momentum.buffered && rules.momentum.nesterov; }

  template <class S>
  MK_DEVICE void keep(int here, R weight, R grad, R old) const {
    grad = rules.gradient(R(0), grad);
    w[here] = weight;
    b[here] = stored ? old : rules.momentum.buffered ? as_stored<S>(rules.momentum.buffer(grad, old)) : grad;
    if (ahead()) fresh[here] = grad;
  }

  MK_DEVICE void load(int k, int count) const {
    const bool read_momentum = rules.momentum.buffered && (stored || !rules.momentum.first);
    const bool read_grad = !stored || ahead();
    with_storage<R>(g.storage, [&](auto s) {
      using S = decltype(s);
      int done = 0;
      if (in_order) {
        constexpr int size = Chunk<S>::size;
        done = count * E / size * size;
        const S* weights = weight_of<S>() + start(k);
        const S* grads = grad_of<S>() + start(k);
        const S* momenta = momentum_of<S>() + start(k);
#pragma unroll 1
        for (int i = int(threadIdx.x) * size; i < done; i += threads * size) {
          const Chunk<S> weight = load_chunk(weights + i);
          Chunk<S> grad{}, old{};
          if (read_grad) grad = load_chunk(grads + i);
          if (read_momentum) old = load_chunk(momenta + i);
          MK_UNROLL
          for (int j = 0; j < size; j++) {
            keep<S>(slot(i + j), real(weight.number[j]), real(grad.number[j]), real(old.number[j]));
          }
        }
#pragma unroll 1
        for (int i = done + int(threadIdx.x); i < count * E; i += threads) {
          keep<S>(slot(i), real(weights[i]), read_grad ? R(real(grads[i])) : R(0),
                  read_momentum ? R(real(momenta[i])) : R(0));
        }
        return;
      }
      each_address(count, [&](int here, int64_t weight, int64_t grad, int) {
        keep<S>(here, real(weight_of<S>()[weight]), read_grad ? R(real(grad_of<S>()[grad])) : R(0),
                read_momentum ? R(real(momentum_of<S>()[weight])) : R(0));
      });
    });
  }

  // What is in shared memory, but for matrices that stay as they are.
  MK_DEVICE void store(int k, int count, const bool* left) const {
    const bool write_momentum = rules.momentum.buffered && !stored;
    with_storage<R>(g.storage, [&](auto s) {
      using S = decltype(s);
      if (in_order && left == nullptr) {
        const auto put_all = [&](S* to, const R* from) {
          constexpr int size = Chunk<S>::size;
          const int done = count * E / size * size;
#pragma unroll 1
          for (int i = int(threadIdx.x) * size; i < done; i += threads * size) {
            Chunk<S> chunk;
            MK_UNROLL
            for (int j = 0; j < size; j++) put(&chunk.number[j], from[slot(i + j)]);
            store_chunk(to + i, chunk);
          }
#pragma unroll 1
          for (int i = done + int(threadIdx.x); i < count * E; i += threads) put(to + i, from[slot(i)]);
        };
        if (steps) put_all(weight_of<S>() + start(k), w);
        if (write_momentum) put_all(momentum_of<S>() + start(k), b);
        return;
      }
      each_address(count, [&](int here, int64_t weight, int64_t, int c) {
        if (left != nullptr && left[c]) return;
        if (steps) put(weight_of<S>() + weight, w[here]);
        if (write_momentum) put(momentum_of<S>() + weight, b[here]);
      });
    });
  }

 public:
  MK_DEVICE Small(const Tables& t, const Tile& tile, void* shared)
      : t(t),
        g(t.groups[tile.group]),
        tile(tile),
        rules(t, g),
        stored(steps && g.partials && rules.momentum.buffered),
        in_order(g.packed && aligned()),
        weight_at(static_cast<int64_t*>(shared)),
        grad_at(weight_at + threads),
        w(reinterpret_cast<R*>(grad_at + threads)),
        b(w + threads * stride),
        fresh(b + threads * stride) {}

  MK_DEVICE bool aligned() const {
    bool all = false;
    with_storage<R>(g.storage, [&](auto s) {
      using S = decltype(s);
      all = is_aligned(weight_of<S>() + start(0)) && is_aligned(grad_of<S>() + start(0)) &&
            (!rules.momentum.buffered || is_aligned(momentum_of<S>() + start(0)));
    });
    return all;
  }

  // All matrices of the tile. `rate`: lr / tau of a group that was measured before. Returns the thread's part of the
  // sum.
  MK_DEVICE double run(R rate) const {
    MK_SHARED_ARRAY(bool, left_out, threads);
    double sum = 0;
    for (int k = 0; k < tile.count; k += threads) {
      const int count = tile.count - k < threads ? tile.count - k : threads, own = int(threadIdx.x);
      const bool mine = own < count;
      const int64_t position = tile.first + k + own;
      if (mine) {
        const Addressing& geometry = t.geometries[g.geometry];
        const int64_t component = component_of(t, g, position);
        weight_at[own] = component_offset(geometry, geometry.weight_stride, component);
        grad_at[own] = component_offset(geometry, geometry.grad_stride, component);
      }
      __syncthreads();
      load(k, count);
      __syncthreads();

      R q[E], d[E], xi[E], square = R(0);
      Unit<R> unit;
      R scale = R(1);
      bool moves = mine;
      if (mine) {
        scale = R(t.scales[g.scale + position * g.scale_stride]);
        const R inverse = R(1) / scale;
        uint32_t top = 0, weights = 0;
        MK_UNROLL
        for (int e = 0; e < E; e++) {
          q[e] = w[own * stride + e];
          d[e] = b[own * stride + e];
          weights = larger(weights, magnitude(q[e]));
          top = larger(top, magnitude(d[e]));
          q[e] = q[e] * inverse;
        }
        if (ahead()) {
          MK_UNROLL
          for (int e = 0; e < E; e++) top = larger(top, magnitude(fresh[own * stride + e]));
        }
        unit = Unit<R>(top);
        MK_UNROLL
        for (int e = 0; e < E; e++) {
          d[e] = d[e] * unit.inverse;
          if (ahead()) d[e] = rules.momentum.direction(fresh[own * stride + e] * unit.inverse, d[e]);
        }
        moves = larger(top, weights) < Range<R>::beyond;
        if (steps && g.partials) moves = !t.left_out[g.state + position];
        if (moves) square = Map::project(q, d, xi, Size{});
      }
      // R^2 of the matrix; a norm beyond the root of the largest number has one of infinity, and a step of zero.
      const double wide = moves ? double(square) * double(unit.size) * double(unit.size) : 0;
      R own_rate = rate;
      if constexpr (steps) {
        if (tile.alone) {
          const double total = Block::sum(wide);
          own_rate = R(step_size_of<double>(t, g)(total));
          if (t.norms && threadIdx.x == 0) t.norms[g.norm] = sqrt(total);
        } else if (!g.partials) {
          own_rate = step_size_of<R>(t, g).of_norm(sqrt(square) * unit.size);
          if (t.norms && mine && g.individual)
            t.norms[g.norm + position] = moves ? sqrt(wide) : double(__builtin_nan(""));
        }
        if (moves) {
          const R longest = longest_step<R>(g.retraction), norm = sqrt(square);
          R length = own_rate * unit.size / scale;
          if (!(length * norm <= longest)) length = longest / norm;
          Map::retract(q, xi, -length, square, Size{});
          MK_UNROLL
          for (int e = 0; e < E; e++) w[own * stride + e] = q[e] * scale;
        }
      } else {
        sum += wide;
        if (mine) t.left_out[g.state + position] = !moves;
      }
      left_out[own] = mine && !moves;
      const bool some_left = __syncthreads_or(left_out[own]) != 0;
      if (some_left && left_out[own] && !stored_before()) count_nonfinite(t, g, 1);
      store(k, count, some_left ? left_out : nullptr);
      __syncthreads();
    }
    return sum;
  }

  MK_DEVICE bool stored_before() const { return steps && g.partials; }
};

template <class R, class Map, int N, int P, Pass pass>
__global__ void __launch_bounds__(small_threads(N* P), small_blocks<R, Map>(N* P, pass))
    small(Tables t, const Tile* tiles) {
  if (is_skipped(t)) return;
  MK_SHARED(char, shared);
  const Tile tile = tiles[blockIdx.x];
  const Group& g = t.groups[tile.group];
  const Small<R, Map, N, P, pass> work(t, tile, shared);
  if constexpr (pass == Pass::measure) {
    const double sum = Block::sum(work.run(0));
    if (threadIdx.x == 0) t.partials[tile.partial] = sum;
  } else {
    double rate = 0;
    if (g.partials) {
      const double total = total_of(t, g);
      rate = step_size_of<double>(t, g)(total);
      if (t.norms && threadIdx.x == 0 && tile.first == 0) t.norms[g.norm] = sqrt(total);
    }
    work.run(R(rate));
  }
}

}  // namespace cuda
}  // namespace mk
