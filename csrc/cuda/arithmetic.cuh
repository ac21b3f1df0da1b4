// Numbers on the device: storage, 16-byte accesses, and powers of two that keep squares in range.
#pragma once

#include "cuda/device.cuh"
#include "cuda/tables.h"
#include "half.h"
#include "rules/momentum.h"
#include "rules/step_size.h"

namespace mk {
namespace cuda {

// Calls f with a number of the storage type. R, the arithmetic type, narrows the choice.
template <class R, class F>
MK_DEVICE void with_storage(Storage storage, const F& f) {
  if constexpr (sizeof(R) == 8) {
    f(double{});
  } else {
    switch (storage) {
      case Storage::bfloat16:
        return f(BFloat16{});
      case Storage::float16:
        return f(Float16{});
      default:
        return f(float{});
    }
  }
}

// What storing x and loading it again gives.
template <class S, class R>
MK_DEVICE R as_stored(R x) {
  S s;
  put(&s, x);
  return real(s);
}

// 16 bytes of memory, moved at once.
template <class S>
struct alignas(16) Chunk {
  static constexpr int size = 16 / int(sizeof(S));
  S number[size];
};
template <class S>
MK_DEVICE Chunk<S> load_chunk(const S* p) {
  return *reinterpret_cast<const Chunk<S>*>(p);
}
template <class S>
MK_DEVICE void store_chunk(S* p, const Chunk<S>& chunk) {
  *reinterpret_cast<Chunk<S>*>(p) = chunk;
}
// The same number by number where `aligned` says that addresses are no multiples of 16.
template <class S>
MK_DEVICE Chunk<S> load_chunk(const S* p, bool aligned) {
  if (aligned) return load_chunk(p);
  Chunk<S> chunk;
  MK_UNROLL
  for (int j = 0; j < Chunk<S>::size; j++) chunk.number[j] = p[j];
  return chunk;
}
template <class S>
MK_DEVICE void store_chunk(S* p, const Chunk<S>& chunk, bool aligned) {
  if (aligned) return store_chunk(p, chunk);
  MK_UNROLL
  for (int j = 0; j < Chunk<S>::size; j++) p[j] = chunk.number[j];
}
MK_DEVICE bool is_aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// The exponent and the leading bits of |x|, ordered as |x| is, Inf and NaN last.
MK_DEVICE uint32_t magnitude(float x) { return bits_of(x) & 0x7fffffff; }
MK_DEVICE uint32_t magnitude(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, 8);
  return uint32_t(bits >> 32) & 0x7fffffff;
}

template <class R>
struct Range;
template <>
struct Range<float> {
  static constexpr uint32_t beyond = 0x7f800000;  // magnitude of infinity
  static constexpr int exponent_shift = 23, bias = 127;
  MK_DEVICE static float power(uint32_t biased) { return float_of(biased << 23); }
};
template <>
struct Range<double> {
  static constexpr uint32_t beyond = 0x7ff00000;
  static constexpr int exponent_shift = 20, bias = 1023;
  MK_DEVICE static double power(uint32_t biased) {
    const uint64_t bits = uint64_t(biased) << 52;
    double x;
    __builtin_memcpy(&x, &bits, 8);
    return x;
  }
};

// A power of two near the largest number of a vector: divided by it, no square overflows or vanishes.
template <class R>
struct Unit {
  R size, inverse;
  MK_DEVICE Unit() : size(R(1)), inverse(R(1)) {}
  // `top`: the largest magnitude, of a finite number.
  MK_DEVICE explicit Unit(uint32_t top) {
    const uint32_t bias = Range<R>::bias, biased = top >> Range<R>::exponent_shift;
    // Two steps from both ends, where the inverse is a number, too.
    const uint32_t within = biased < 2 ? 2 : biased > 2 * bias - 2 ? 2 * bias - 2 : biased;
    size = Range<R>::power(within);
    inverse = Range<R>::power(2 * bias - within);
  }
};

MK_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a < b ? b : a; }

// The longest step in units of the scale. Of a longer one rounding leaves the direction alone; where Gram matrices are
// made, they are to keep half of the digits.
template <class R>
MK_DEVICE R longest_step(Retraction retraction) {
  const bool wide = sizeof(R) == 8;
  if (retraction == Retraction::polar) return wide ? R(0x1p27) : R(0x1p12f);
  if (retraction == Retraction::cayley || retraction == Retraction::exp) return R(64);
  return wide ? R(0x1p60) : R(0x1p30f);
}

// The rules of a group at this step.
template <class R>
struct Rules {
  Momentum<R> momentum;
  R inverse;  // of the gradient's divisor

  MK_DEVICE Rules(const Tables& t, const Group& g) {
    const Hyper& h = t.hyper[g.hyper];
    const bool decays = g.manifold == ManifoldCode::euclidean;
    const bool adaptive = g.rule == Rule::adam_g && g.manifold == ManifoldCode::grassmann;
    momentum.momentum = R(h.momentum);
    momentum.one_minus_dampening = R(1 - h.dampening);
    momentum.weight_decay = R(decays ? h.weight_decay : 0);
    momentum.first = t.steps[g.parameter] == 0;
    momentum.nesterov = h.nesterov != 0;
    const R scale = t.grad_scale != nullptr ? R(*t.grad_scale) : R(1);
    momentum.divisor = h.maximize != 0 ? -scale : scale;
    momentum.plain = momentum.divisor == R(1);
    inverse = R(1) / momentum.divisor;
    momentum.buffered = t.tensors[g.parameter].momentum != nullptr && (adaptive || h.momentum != 0);
  }

  // What was loaded as the gradient by its divisor: a quotient, rounded as a division's, without its subroutine.
  MK_DEVICE R divided(R g) const {
    if (momentum.plain) return g;
    const R quotient = g * inverse;
    return fma(fma(-quotient, momentum.divisor, g), inverse, quotient);
  }
  // The gradient of w as torch.optim.SGD takes it.
  MK_DEVICE R gradient(R w, R g) const {
    g = divided(g);
    return momentum.weight_decay != R(0) ? fma(w, momentum.weight_decay, g) : g;
  }
};

template <class R>
MK_DEVICE StepSize<R> step_size_of(const Tables& t, const Group& g) {
  const Hyper& h = t.hyper[g.hyper];
  return {R(h.lr), R(h.rho), R(h.curvature), g.bounded};
}

// Whether this step is to be left out: some gradient overflowed.
MK_DEVICE bool is_skipped(const Tables& t) { return t.found_inf != nullptr && *t.found_inf != 0; }

// --- addresses ---

MK_DEVICE int64_t component_of(const Tables& t, const Group& g, int64_t k) {
  return g.listed ? t.components[g.first + k] : g.first + k;
}

// i / size and the rest, by a product that is off by one at most: numbers below 2^53 are doubles, too.
struct Divided {
  int64_t quotient, rest;
  MK_DEVICE Divided(int64_t i, int64_t size, double inverse) {
    quotient = int64_t(double(i) * inverse);
    rest = i - quotient * size;
    if (rest < 0) {
      quotient--;
      rest += size;
    } else if (rest >= size) {
      quotient++;
      rest -= size;
    }
  }
};

// The offset of index i over the dimensions [from, to), the last one fastest.
MK_DEVICE int64_t offset_over(const Addressing& g, const int64_t* stride, int from, int to, int64_t i) {
  if (from == to) return 0;
  int64_t offset = 0;
#pragma unroll 1
  for (int d = to - 1; d > from; d--) {
    const Divided at(i, g.size[d], g.inverse[d]);
    offset += at.rest * stride[d];
    i = at.quotient;
  }
  return offset + i * stride[from];
}

MK_DEVICE int64_t component_offset(const Addressing& g, const int64_t* stride, int64_t component) {
  return offset_over(g, stride, 0, g.batch_dims, component);
}

}  // namespace cuda
}  // namespace mk
