// Batches of small matrices of one size, a matrix to a thread, in its registers. Shared memory is on the way only: it
// turns accesses in the order of memory into those of a thread's own matrix, an odd number apart.
#pragma once

#include "cuda/decompose.cuh"
#include "cuda/decompose.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "linalg/polar_of_any.h"

namespace mk {
namespace cuda {

constexpr int register_threads(int elements) { return elements <= 25 ? 128 : 64; }
constexpr int odd_numbers(int n, int p) { return n * p | 1; }

template <Decomposition what, class R, int N>
__global__ void __launch_bounds__(register_threads(N* N)) in_registers(Batch batch) {
  constexpr int E = N * N, stride = odd_numbers(N, N), threads = register_threads(E);
  using T = Team<threads>;
  MK_SHARED(R, shared);
  R* const own = shared + int(threadIdx.x) * stride;
  const int64_t first = int64_t(blockIdx.x) * threads, rest = batch.count - first;
  const int count = int(rest < threads ? rest : threads);
  const auto write = [&](void* to) {
    __syncthreads();
    write_matrices<T>(static_cast<R*>(to) + first * E, count, N, N,
                      [&](int c, int i, int j) { return shared[c * stride + j * N + i]; });
  };
  read_matrices<T>(static_cast<const R*>(batch.x) + first * E, count, N, N,
                   [&](int c, int i, int j, R x) { shared[c * stride + j * N + i] = x; });
  __syncthreads();
  const Fixed<N, N> size;
  R A[E];
  MK_UNROLL
  for (int e = 0; e < E; e++) A[e] = int(threadIdx.x) < count ? own[e] : R(0);
  if constexpr (what == Decomposition::qr) {
    R memory[reflections_numbers(N, N)];
    const Reflections<R> of = reflections_at(memory, N);
    householder(A, of, size);
    if (batch.r != nullptr) {
      MK_UNROLL
      for (int e = 0; e < E; e++) own[e] = element_of_r(A, of, N, e % N, e / N);
      write(batch.r);
      __syncthreads();
    }
    reflections_to_q(A, of, size);
    MK_UNROLL
    for (int e = 0; e < E; e++) own[e] = A[e];
  } else {
    R Z[E], memory[polar_work_numbers(N)];
    polar_of_any(A, Z, polar_work_at(memory, N), size, size);
    MK_UNROLL
    for (int e = 0; e < E; e++) own[e] = Z[e];
  }
  write(batch.q);
}

template <Decomposition what, class R, int N>
void add_in_registers(std::vector<BatchKernel>& table) {
  table.push_back(
      {what, sizeof(R) == 8, N, N, 1, register_threads(N * N), odd_numbers, launch<in_registers<what, R, N>, Batch>});
}

}  // namespace cuda
}  // namespace mk
