// Batches of larger matrices, each to a warp or a block, in shared memory.
#include "cuda/decompose.cuh"
#include "cuda/decompose.h"
#include "cuda/launch.cuh"
#include "cuda/polar_of_any.cuh"

namespace mk {
namespace cuda {
namespace {

template <Decomposition what>
constexpr int numbers_of(int n, int p) {
  return what == Decomposition::qr ? p * odd(n) + reflections_numbers(n < p ? n : p, p) : polar_numbers(n, p);
}

// Of a block: one team, or two warps.
template <class T>
constexpr int threads_of = T::is_block ? T::size : 64;

template <Decomposition what, class R, class T>
__global__ void __launch_bounds__(threads_of<T>, 1) by_teams(Batch batch) {
  MK_SHARED(R, shared);
  const int n = int(batch.n), p = int(batch.p), k = n < p ? n : p;
  const int64_t matrix = int64_t(blockIdx.x) * (int(blockDim.x) / T::size) + T::number();
  if (matrix >= batch.count) return;  // a warp; of a block there is none
  const SharedMatrix<R> A = by_columns(shared + T::number() * numbers_of<what>(n, p), n, p);
  read_matrices<T>(static_cast<const R*>(batch.x) + matrix * n * p, 1, n, p,
                   [&](int, int i, int j, R x) { A(i, j) = x; });
  T::sync();
  R* const q = static_cast<R*>(batch.q) + matrix * n * k;
  if constexpr (what == Decomposition::polar) {
    polar_of_any<T>(A, q);
  } else {
    const Reflections<R> of = reflections_at(A.at + p * odd(n), k);
    balance<T>(A, of);
    reflections<T>(A, of);
    if (batch.r != nullptr) {
      write_matrices<T>(static_cast<R*>(batch.r) + matrix * k * p, 1, k, p, [&](int, int i, int j) {
        return i > j ? R(0) : (i == j ? of.diagonal[j] : A(i, j)) * of.magnitude[j];
      });
      T::sync();
    }
    reflections_to_q<T>(A, of);
    write_matrices<T>(q, 1, n, k, [&](int, int i, int j) { return A(i, j); });
  }
}

template <Decomposition what, class R, class T>
void add(std::vector<BatchKernel>& table) {
  table.push_back(
      {what, sizeof(R) == 8, 0, 0, T::size, threads_of<T>, numbers_of<what>, launch<by_teams<what, R, T>, Batch>});
}

template <class T>
void add_all(std::vector<BatchKernel>& table) {
  add<Decomposition::qr, float, T>(table);
  add<Decomposition::qr, double, T>(table);
  add<Decomposition::polar, float, T>(table);
  add<Decomposition::polar, double, T>(table);
}

}  // namespace

void add_by_teams(std::vector<BatchKernel>& table) {
  add_all<Team<32>>(table);
  add_all<Block>(table);
}

}  // namespace cuda
}  // namespace mk
