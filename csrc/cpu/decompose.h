// Batches of QR and polar decompositions on the CPU: what the kernels of an instruction set are.
#pragma once

#include "batch.h"

namespace mk {

// Up to here matrices are decomposed in the lanes of registers; larger ones go to torch's linear algebra.
constexpr int64_t decompose_elements = 2048;

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

}  // namespace mk
