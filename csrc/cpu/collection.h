// A weight whose kernels are dealt to several groups and manifolds ([FG] Section 4: PI, PO, PIO), as one piece of work:
// a plain struct between the driver and the kernels of an instruction set.
#pragma once

#include "cpu/job.h"

namespace mk {

// Kernels are stepped where they lie, a block of neighbours at a time, whatever their manifolds. What is known of a
// kernel stands at its place: in the lane that it has in its block.
struct Collection {
  static constexpr int manifolds = 4;     // Euclidean, sphere, oblique, Stiefel, by their codes
  static constexpr int64_t chunk = 1024;  // blocks that are summed together
  static constexpr int most_lanes = 16;   // of a block, with any instruction set

  const Job* job;          // one of those of the weight, which agree in all that is taken from it
  int64_t count;           // kernels
  const int32_t* group;    // of each place; groups are numbered manifold by manifold
  int32_t end[manifolds];  // behind the last group of each manifold
  int32_t groups;          // with one more, of the lanes that are left over
  double scale[manifolds];
  double* square;  // of each chunk and group: the sum of ||xi||^2
  float* step;     // of each group: lr / tau
  // Of each block, the kernels that the sweeps leave to their jobs: bit i is for lane i and a kernel of which nothing
  // is done, bit i + most_lanes for one that has its momentum and its part in the group's norm.
  uint32_t* left;
};

}  // namespace mk
