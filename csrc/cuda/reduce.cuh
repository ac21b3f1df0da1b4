// Sums and maxima over the threads of a team, in an order that depends on the size of the team alone: the same numbers
// give the same bits. Every thread of the team gets the result.
#pragma once

#include "cuda/arithmetic.cuh"
#include "cuda/limits.h"

namespace mk {
namespace cuda {

// `Threads` neighbouring threads: a part of a warp, a warp, or (256) a block.
template <int Threads>
struct Team {
  static constexpr int size = Threads;
  static constexpr bool is_block = Threads > 32;

  MK_DEVICE static int rank() { return int(threadIdx.x) % Threads; }
  MK_DEVICE static int number() { return int(threadIdx.x) / Threads; }
  MK_DEVICE static unsigned mask() {
    return Threads >= 32 ? ~0u : ((1u << (Threads % 32)) - 1) << (int(threadIdx.x) % 32 / Threads * Threads);
  }
  MK_DEVICE static void sync() {
    if constexpr (is_block) {
      __syncthreads();
    } else {
      __syncwarp(mask());
    }
  }

  template <class T, class F>
  MK_DEVICE static T fold(T x, const F& f) {
    constexpr int width = is_block ? 32 : Threads;
    MK_UNROLL
    for (int across = width / 2; across > 0; across /= 2) x = f(x, __shfl_xor_sync(mask(), x, across, width));
    if constexpr (is_block) {
      MK_SHARED_ARRAY(T, each_warp, 32);
      const int lane = int(threadIdx.x) % 32, warps = int(blockDim.x) / 32;
      __syncthreads();  // the last result has been read
      if (lane == 0) each_warp[threadIdx.x / 32] = x;
      __syncthreads();
      x = each_warp[0];
      for (int w = 1; w < warps; w++) x = f(x, each_warp[w]);
    }
    return x;
  }
  template <class T>
  MK_DEVICE static T sum(T x) {
    return fold(x, [](T a, T b) { return a + b; });
  }
  MK_DEVICE static uint32_t largest(uint32_t x) {
    return fold(x, [](uint32_t a, uint32_t b) { return larger(a, b); });
  }
  MK_DEVICE static bool any(bool x) {
    if constexpr (is_block) {
      return __syncthreads_or(x) != 0;
    } else {
      return __any_sync(mask(), x) != 0;
    }
  }
};

// The threads of a block, however many there are.
using Block = Team<block_threads>;

// The sum of a group that took a launch before this one; read by all threads of a block.
MK_DEVICE double total_of(const Tables& t, const Group& g) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < g.partials; i += blockDim.x) sum += t.partials[g.partial + i];
  return Block::sum(sum);
}

// One thread of the block adds n components that were left as they are.
MK_DEVICE void count_nonfinite(const Tables& t, const Group& g, int64_t n) {
  if (n)
    atomicAdd(reinterpret_cast<unsigned long long*>(t.nonfinite + g.parameter), static_cast<unsigned long long>(n));
}

}  // namespace cuda
}  // namespace mk
