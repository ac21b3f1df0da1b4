// The sizes at which one kernel takes over from another.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/job.h"

namespace mk {
namespace cuda {

constexpr int block_threads = 256;

// Shared memory of a block in bytes: what any GPU gives without being asked, and what is kept back of it for the arrays
// that kernels declare themselves. The rest is dynamic.
constexpr size_t unasked_shared = 48 * 1024, declared_shared = 1024;

// Vectors: up to here a part of a warp takes one, and a warp; longer ones take a block.
constexpr int64_t short_vector_elements = 32, warp_vector_elements = 1024;

// Stiefel matrices: rows of those that a warp and a block takes.
constexpr int64_t warp_matrix_rows = 32, block_matrix_rows = 128;

// Numbers of shared memory that matrices.cuh needs for one matrix.
constexpr int64_t matrix_numbers(Retraction retraction, int64_t n, int64_t p) {
  const int64_t matrix = n * p, square = p * p;
  if (retraction != Retraction::cayley && retraction != Retraction::exp) return 2 * matrix + square;
  return n == p ? 2 * matrix + 4 * square : 4 * matrix + 14 * square;
}

}  // namespace cuda
}  // namespace mk
