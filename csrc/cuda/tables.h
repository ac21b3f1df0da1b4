// What kernels read: plain tables in device memory, put together by planning.cpp.
#pragma once

#include <cstdint>

#include "cpu/job.h"

namespace mk {
namespace cuda {

// Strides as job.h has them, with what replaces divisions: those of 64 bits are subroutines on a GPU.
struct Addressing : Geometry {
  double inverse[max_dims];  // of the sizes
  double inverse_elements;   // of n p
};

// One row for each parameter: where its numbers lie at this step.
struct Tensor {
  void* weight;
  const void* grad;
  void* momentum;  // null without a buffer
  void* variance;  // Adam-G
};

// A group of the plan over one parameter. Tables are indexed by int64_t.
struct Group {
  int32_t parameter, hyper, geometry;
  Rule rule;
  ManifoldCode manifold;
  Retraction retraction;
  Storage storage;
  int64_t first, count;  // components [first, first + count), or where listed components[first ...]
  int64_t scale, scale_stride;
  int64_t norm;               // where R goes in `norms`
  int64_t partial, partials;  // the sums of its tiles, partials of them; none where every tile owns what it steps
  int64_t state;              // where `states` of its vectors, or `left_out` of its components, begin
  int64_t weight_offset, grad_offset;  // of a component's elements, in `element_offsets`
  bool listed;
  bool individual, bounded;
  bool split;     // one component in several tiles, which moves as a whole or stays
  bool in_order;  // element e of a component lies at e, in all tensors
  bool packed;    // component k, too, at k times the size of one
  bool in_lanes;  // neighbouring components lie side by side: channels_last weights
};

// The work of a block: components [first, first + count) of a group, counted in the group; elements of the only
// component in the Euclidean kernel, and columns of it where an oblique matrix is split.
struct Tile {
  int64_t first;
  int64_t partial;  // where its sum goes
  int32_t count, group;
  bool alone;  // it is the whole group
};

// The argument of every kernel.
struct Tables {
  const Tensor* tensors;
  const Group* groups;
  const Addressing* geometries;
  const int64_t* element_offsets;
  const int64_t* components;
  const double* scales;
  const Hyper* hyper;
  const uint8_t* taken;  // parameters with a gradient
  int64_t* steps;
  int64_t* nonfinite;
  double* partials;
  double* states;           // state_numbers for each vector of groups that take two launches
  uint8_t* left_out;        // a byte for each component of such groups of matrices
  double* norms;            // null where R is not asked for
  const float* grad_scale;  // null where gradients are not scaled
  const float* found_inf;   // null, or not zero where the step is not to be taken
  int64_t parameters;
};

constexpr int state_numbers = 4;

// What a launch does: the norms of the groups that are more than one tile, or the steps.
enum class Pass : int { measure, step };

}  // namespace cuda
}  // namespace mk
