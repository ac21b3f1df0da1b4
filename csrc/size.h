// Sizes of a matrix: known to the compiler (everything unrolls into registers) or to the program only.
#pragma once

namespace mk {

template <int N, int P>
struct Fixed {
  static constexpr int n = N, p = P, columns = P;
  static constexpr int capacity = N * P;             // elements of an n x p matrix
  static constexpr int square_capacity = P * P;      // of a p x p one
  static constexpr int double_capacity = 4 * P * P;  // of a 2p x 2p one
  static constexpr int tall_capacity = 2 * N * P;    // of an n x 2p one
};

// Any n x p with n >= p for orthonormalisation, n p <= capacity.
struct Dynamic {
  int n, p;
  static constexpr int columns = 1;  // at least
  static constexpr int capacity = 256;
  static constexpr int square_capacity = 256;
  static constexpr int double_capacity = 1024;
  static constexpr int tall_capacity = 512;
};

// The sizes with kernels of their own, those that have them for every retraction, and those that step 16-bit weights
// without a copy; every other size takes the Dynamic path.
#define MK_FIXED_SIZES(X) X(2, 2) X(3, 3) X(4, 4) X(5, 5) X(7, 7)
#define MK_COMMON_SIZES(X) X(3, 3) X(5, 5)

}  // namespace mk
#define MK_HALF_SIZES(X) X(3, 3)
