#include "cpu/decompose.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <new>
#include <string>

#include "cpu/driver.h"

namespace mk {
namespace {

// Matrices in a register, at most: pieces begin at a multiple of it.
constexpr int64_t block = 16;
// Work below this is not worth waking threads for: elements of x, by the length of a matrix's shorter side.
constexpr int64_t serial_work = 1 << 14;
constexpr std::align_val_t alignment{64};

}  // namespace

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

void decompose(const Batch& batch, void (*kernel)(const Batch&, int64_t, int64_t, void*)) {
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

}  // namespace mk
