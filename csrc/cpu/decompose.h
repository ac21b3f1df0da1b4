// Batches of QR and polar decompositions: plain structs between the operators and the kernels of an instruction set.
#pragma once

#include <cstdint>

namespace mk {

// Up to here matrices are decomposed in the lanes of registers; larger ones go to torch's linear algebra.
constexpr int64_t decompose_elements = 2048;

// `count` matrices n x p, row-major, one after the other.
struct Batch {
  bool is_double;
  const void* x;
  void* q;  // n x k, k = min(n, p)
  void* r;  // k x p, or null: not wanted
  int64_t count, n, p;
};

struct Decompositions {
  // Matrices [begin, end), begin a multiple of every register's lanes; a matrix gets the same bits wherever it stands.
  void (*qr)(const Batch&, int64_t begin, int64_t end, void* scratch);
  void (*polar)(const Batch&, int64_t begin, int64_t end, void* scratch);  // n >= p
  int64_t (*scratch_bytes)(const Batch&);
};

extern const Decompositions decompositions_baseline;
#if defined(__x86_64__)
extern const Decompositions decompositions_avx2;
extern const Decompositions decompositions_avx512;
#endif

// The kernels in use, chosen as those of the step are.
const Decompositions& decompositions();

// Everything in the batch, on torch's threads.
void decompose(const Batch& batch, void (*kernel)(const Batch&, int64_t, int64_t, void*));

}  // namespace mk
