// The table of all kernels: what planning.cpp chooses from, and what reports enumerate.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "cuda/tables.h"

namespace mk {
namespace cuda {

using Stream = void*;  // cudaStream_t

enum class Engine {
  elements,         // Euclidean groups
  small,            // a matrix to a thread
  vectors,          // FG-SGD on vectors: a vector to a team of threads
  scale_invariant,  // PSI, a row to a team
  grassmann,        // SGD-G and Adam-G, a row to a team
  matrices,         // Stiefel matrices in shared memory
  advance           // counts the step
};

// What a kernel was compiled for; fields that an engine does not look at are zero.
struct Key {
  Engine engine;
  bool wide;  // float64, else float32 and the 16-bit types
  Pass pass;
  ManifoldCode manifold;  // small
  Retraction retraction;  // small; add where only norms are measured
  int n, p;               // small
  int team;               // threads to a vector or a matrix
  bool operator==(const Key&) const = default;
};

struct Kernel {
  Key key;
  int threads;    // of a block
  size_t shared;  // dynamic shared memory of a block in bytes; 0 where it depends on the matrices
  void (*start)(unsigned blocks, int threads, size_t shared, Stream, const Tables&, const Tile*);

  // As in "small stiefel qr 3x3 float step".
  std::string name() const;
};

const std::vector<Kernel>& kernels();

// Null where there is none.
const Kernel* find(const Key&);

// One function for each source with kernels.
void add_elements(std::vector<Kernel>&);
void add_small_vectors(std::vector<Kernel>&);
void add_small_stiefel(std::vector<Kernel>&);
void add_small_stiefel_others(std::vector<Kernel>&);
void add_vectors(std::vector<Kernel>&);
void add_scale_invariant(std::vector<Kernel>&);
void add_grassmann(std::vector<Kernel>&);
void add_matrices(std::vector<Kernel>&);

}  // namespace cuda
}  // namespace mk
