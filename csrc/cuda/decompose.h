// The table of kernels that decompose batches: what decomposer.cpp chooses from.
#pragma once

#include <vector>

#include "batch.h"
#include "cuda/kernels.h"

namespace mk {
namespace cuda {

// Matrices up to so many elements go to threads, one to each; beyond them, to so many rows and columns, to warps; then,
// to so many elements, to blocks.
constexpr int64_t thread_elements = 64, warp_side = 32, block_elements = 128 * 128;

// A row of the table of kernels.
struct BatchKernel {
  Decomposition what;
  bool wide;                     // float64
  int n, p;                      // of the only matrices that it takes, or 0
  int team;                      // threads to a matrix
  int threads;                   // of a block
  int (*numbers)(int n, int p);  // of shared memory for a matrix
  void (*start)(unsigned blocks, int threads, size_t shared, Stream, Batch);
};

// Those that go first are taken where several could.
const std::vector<BatchKernel>& batch_kernels();

// One function for each source with kernels.
void add_qr_in_registers(std::vector<BatchKernel>&);
void add_polar_in_registers(std::vector<BatchKernel>&);
void add_by_threads(std::vector<BatchKernel>&);
void add_by_teams(std::vector<BatchKernel>&);

}  // namespace cuda
}  // namespace mk
