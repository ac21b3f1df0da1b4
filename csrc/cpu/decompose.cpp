// The operators of decompositions.py for tensors on the CPU: blocks of a register full of matrices, on torch's threads.
#include "cpu/decompose.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <new>
#include <string>

#include "cpu/driver.h"
#include "functional.h"

namespace mk {
namespace {

// Matrices in a register, at most: pieces begin at a multiple of it.
constexpr int64_t block = 16;
// Work below this is not worth waking threads for: elements of x, by the length of a matrix's shorter side.
constexpr int64_t serial_work = 1 << 14;
constexpr std::align_val_t alignment{64};

// The kernels in use, chosen as those of the step are.
const Decompositions& decompositions() {
#if defined(__x86_64__)
  static const Decompositions& chosen = instruction_set() == std::string("avx512") ? decompositions_avx512
                                        : instruction_set() == std::string("avx2") ? decompositions_avx2
                                                                                   : decompositions_baseline;
  return chosen;
#else
  return decompositions_baseline;
#endif
}

bool has_kernel(Decomposition, const Batch& batch, at::Device) { return batch.n * batch.p <= decompose_elements; }

void decompose(Decomposition what, const Batch& batch, at::Device) {
  const auto kernel = what == Decomposition::qr ? decompositions().qr : decompositions().polar;
  const size_t bytes = size_t(decompositions().scratch_bytes(batch));
  const int64_t blocks = (batch.count + block - 1) / block;
  const int64_t work = block * batch.n * batch.p * std::min(batch.n, batch.p);
  const int64_t grain = std::max<int64_t>(1, serial_work / work);
  at::parallel_for(0, blocks, grain, [&](int64_t from, int64_t to) {
    void* scratch = ::operator new(bytes, alignment);
    kernel(batch, from * block, std::min(to * block, batch.count), scratch);
    ::operator delete(scratch, alignment);
  });
}

constexpr Decomposer on_cpu{has_kernel, decompose};

}  // namespace
}  // namespace mk

TORCH_LIBRARY_IMPL(manifold_kernels, CPU, m) {
  m.impl("qr", [](const at::Tensor& x) { return mk::qr(x, mk::on_cpu); });
  m.impl("qf", [](const at::Tensor& x) { return mk::qf(x, mk::on_cpu); });
  m.impl("polar", [](const at::Tensor& x) { return mk::polar(x, mk::on_cpu); });
}
