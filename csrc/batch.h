// Batches of matrices to decompose: plain structs between the operators and the kernels.
#pragma once

#include <cstdint>

namespace mk {

enum class Decomposition { qr, polar };

// `count` matrices n x p, row-major, one after the other.
struct Batch {
  bool is_double;
  const void* x;
  void* q;  // n x k, k = min(n, p)
  void* r;  // k x p, or null: not wanted
  int64_t count, n, p;
};

}  // namespace mk
