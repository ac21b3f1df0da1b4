// Which kernel of a weight belongs to which group: the lists of a plan turned round. Plans do not change from step to
// step, so that it is done once for each.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "cpu/collection.h"

namespace mk {

// What jobs were made from.
struct PlanTensors {
  const at::Tensor &groups, &components;
  // Of each job: whether a row of its weight, be it empty here, is of kernels with norms of their own.
  const std::vector<uint8_t>& beside_individual;
};

struct Numbering {
  bool fits;                   // whether the jobs list each kernel once, in order
  std::vector<int> order;      // of the jobs, manifold by manifold
  std::vector<int32_t> first;  // number of each job's first group, in that order
  int32_t end[Collection::manifolds];
  std::vector<int32_t> group;  // of each place
};

// Of jobs [begin, end), which belong to one weight.
std::shared_ptr<const Numbering> numbering_of(const std::vector<Job>& jobs, int begin, int end,
                                              const PlanTensors& plan);

}  // namespace mk
