#include "cuda/decomposer.h"

#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "cuda/context.h"
#include "cuda/decompose.h"

namespace mk {
namespace cuda {
namespace {

size_t shared_memory(const BatchKernel& kernel, const Batch& batch) {
  const size_t numbers = size_t(kernel.numbers(int(batch.n), int(batch.p)));
  return size_t(kernel.threads / kernel.team) * numbers * (kernel.wide ? sizeof(double) : sizeof(float));
}

bool takes(const BatchKernel& kernel, Decomposition what, const Batch& batch, size_t room) {
  if (kernel.what != what || kernel.wide != batch.is_double) return false;
  if (kernel.n != 0) return kernel.n == batch.n && kernel.p == batch.p;
  const int64_t elements = batch.n * batch.p;
  const bool small = kernel.team == 1           ? elements <= thread_elements
                     : kernel.team == warp_side ? std::max(batch.n, batch.p) <= warp_side
                                                : elements <= block_elements;
  return small && shared_memory(kernel, batch) <= room;
}

const BatchKernel* find(Decomposition what, const Batch& batch, at::Device device) {
  const size_t room = shared_memory_of_block(device);
  for (const BatchKernel& kernel : batch_kernels())
    if (takes(kernel, what, batch, room)) return &kernel;
  return nullptr;
}

bool has_kernel(Decomposition what, const Batch& batch, at::Device device) {
  return find(what, batch, device) != nullptr;
}

void decompose(Decomposition what, const Batch& batch, at::Device device) {
  const c10::DeviceGuard guard(device);
  const BatchKernel& kernel = *find(what, batch, device);
  const int64_t each = kernel.threads / kernel.team, blocks = (batch.count + each - 1) / each;
  kernel.start(unsigned(blocks), kernel.threads, shared_memory(kernel, batch), current_stream(device), batch);
}

}  // namespace

const std::vector<BatchKernel>& batch_kernels() {
  static const std::vector<BatchKernel> all = [] {
    std::vector<BatchKernel> table;
    add_qr_in_registers(table);
    add_polar_in_registers(table);
    add_by_threads(table);
    add_by_teams(table);
    return table;
  }();
  return all;
}

const Decomposer on_gpu{has_kernel, decompose};

}  // namespace cuda
}  // namespace mk
