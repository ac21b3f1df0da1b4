// Batches of small matrices of any size, a matrix to a thread, which works on it in shared memory.
#include "cuda/decompose.cuh"
#include "cuda/decompose.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "linalg/polar_of_any.h"

namespace mk {
namespace cuda {
namespace {

using T = Team<32>;  // a block

// As linalg/householder.h has it, for loops that run to a few rows.
struct SmallSize {
  int n, p;
  static constexpr int square_capacity = 8;  // what a row is kept in
};

template <Decomposition what>
constexpr int numbers_of(int n, int p) {
  const int k = n < p ? n : p;
  return (what == Decomposition::qr ? n * p + reflections_numbers(k, p) : 2 * n * p + polar_work_numbers(p)) | 1;
}

template <Decomposition what, class R>
__global__ void __launch_bounds__(T::size) by_threads(Batch batch) {
  MK_SHARED(R, shared);
  const int n = int(batch.n), p = int(batch.p), k = n < p ? n : p, stride = numbers_of<what>(n, p);
  const int64_t first = int64_t(blockIdx.x) * T::size, rest = batch.count - first;
  const int count = int(rest < T::size ? rest : T::size), own = int(threadIdx.x);
  const auto matrix = [&](int c) { return shared + c * stride; };
  read_matrices<T>(static_cast<const R*>(batch.x) + first * n * p, count, n, p,
                   [&](int c, int i, int j, R x) { matrix(c)[j * n + i] = x; });
  T::sync();
  const SmallSize size{n, p};
  int result = 0;  // where Q begins
  if constexpr (what == Decomposition::qr) {
    const auto of = [&](int c) { return reflections_at(matrix(c) + n * p, k); };
    if (own < count) householder(matrix(own), of(own), size);
    if (batch.r != nullptr) {
      T::sync();
      write_matrices<T>(static_cast<R*>(batch.r) + first * k * p, count, k, p,
                        [&](int c, int i, int j) { return element_of_r(matrix(c), of(c), n, i, j); });
      T::sync();
    }
    if (own < count) reflections_to_q(matrix(own), of(own), size);
  } else {
    R *const A = matrix(own), *const Z = A + n * p;
    if (own < count) polar_of_any(A, Z, polar_work_at(Z + n * p, p), size, SmallSize{p, p});
    result = n * p;
  }
  T::sync();
  write_matrices<T>(static_cast<R*>(batch.q) + first * n * k, count, n, k,
                    [&](int c, int i, int j) { return matrix(c)[result + j * n + i]; });
}

template <Decomposition what, class R>
void add(std::vector<BatchKernel>& table) {
  table.push_back({what, sizeof(R) == 8, 0, 0, 1, T::size, numbers_of<what>, launch<by_threads<what, R>, Batch>});
}

}  // namespace

void add_by_threads(std::vector<BatchKernel>& table) {
  add<Decomposition::qr, float>(table);
  add<Decomposition::qr, double>(table);
  add<Decomposition::polar, float>(table);
  add<Decomposition::polar, double>(table);
}

}  // namespace cuda
}  // namespace mk
