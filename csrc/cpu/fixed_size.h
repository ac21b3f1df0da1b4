// The sizes of size.h, for the compilations of lanes.h that know them. In float arithmetic: float64 is for checking,
// and would double the time of a build.
#pragma once

#include "cpu/lanes.h"
#include "cpu/pairs.h"
#include "cpu/streams.h"

namespace mk {
namespace MK_ISA {
namespace {

// An x86-64 without AVX2 is to be right, not fast: a quarter of a build would go into it.
#if defined(__x86_64__) && !defined(__AVX2__)
constexpr bool has_fixed_sizes = false;
#else
constexpr bool has_fixed_sizes = true;
#endif

#define MK_RUN(N, P)                                      \
  if (n == N && p == P) {                                 \
    Lanes<float, Map, Fixed<N, P>, S>(job, {}).run(pass); \
    return true;                                          \
  }

// False where the job's size is none of MK_FIXED_SIZES. S is the storage that is stepped in place.
template <class Map, class S = float>
[[maybe_unused]] bool with_fixed_size([[maybe_unused]] const Job& job, [[maybe_unused]] const Pass& pass) {
  if constexpr (has_fixed_sizes) {
    const int n = int(job.geometry->n), p = int(job.geometry->p);
    MK_FIXED_SIZES(MK_RUN)
  }
  return false;
}

// The same for MK_COMMON_SIZES.
template <class Map, class S = float>
[[maybe_unused]] bool with_common_size([[maybe_unused]] const Job& job, [[maybe_unused]] const Pass& pass) {
  if constexpr (has_fixed_sizes) {
    const int n = int(job.geometry->n), p = int(job.geometry->p);
    MK_COMMON_SIZES(MK_RUN)
  }
  return false;
}

// The same for MK_HALF_SIZES, with the job's 16-bit storage stepped in place.
template <class Map>
[[maybe_unused]] bool with_half_size([[maybe_unused]] const Job& job, [[maybe_unused]] const Pass& pass) {
  if constexpr (has_fixed_sizes) {
    const int n = int(job.geometry->n), p = int(job.geometry->p);
    if (job.storage == Storage::bfloat16) {
      using S = BFloat16;
      MK_HALF_SIZES(MK_RUN)
    } else {
      using S = Float16;
      MK_HALF_SIZES(MK_RUN)
    }
  }
  return false;
}
#undef MK_RUN

}  // namespace
}  // namespace MK_ISA
}  // namespace mk
