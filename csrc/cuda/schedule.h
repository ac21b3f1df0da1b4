// A planned step with its tables in device memory, kept for as long as the plan and the way that tensors lie in memory
// stay the same.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>
#include <memory>
#include <vector>

#include "arguments.h"
#include "cuda/planning.h"

namespace mk {
namespace cuda {

// Groups that torch's linear algebra steps.
struct LibraryGroup {
  int64_t row, norm;
  Geometry geometry;
  bool transposed;
};

// Bytes collected on the host, to be in device memory at once.
class Upload {
  std::vector<char> bytes;

 public:
  // Appends; returns where, a multiple of 16.
  template <class T>
  size_t add(const std::vector<T>& values) {
    const size_t start = (bytes.size() + 15) / 16 * 16;
    bytes.resize(start + values.size() * sizeof(T));
    if (!values.empty()) std::memcpy(bytes.data() + start, values.data(), values.size() * sizeof(T));
    return start;
  }
  const std::vector<char>& content() const { return bytes; }

  // The bytes on `device`. The copy is asynchronous; `host` must live until it is done, which pinned memory of torch's
  // sees to by itself, unless a graph that is being captured is to copy again.
  at::Tensor send(at::Device device, at::Tensor* host) const;
};

struct LaunchOnDevice {
  const Kernel* kernel;
  size_t shared;
  unsigned blocks;
  size_t tiles;  // where they start in the tables
};

struct Schedule {
  // --- what it was made for ---
  std::vector<int64_t> key;
  at::Tensor plan_groups, plan_components, plan_scales;  // kept, so that no other tensor comes by their addresses

  // --- what does not change ---
  std::vector<LaunchOnDevice> launches;
  std::vector<LibraryGroup> library;
  at::Tensor tables, components;
  size_t groups_at, geometries_at, offsets_at;
  at::Tensor partials, states, left_out;

  // --- what is refreshed where it changes ---
  at::Tensor scales;
  int64_t scales_version = -1;
  at::Tensor step_table;
  std::vector<char> step_content;
  std::vector<at::Tensor> kept;  // host memory that copies are made from
  bool captured = false;         // in a graph, which will use it again
};

// What a step is planned from.
struct Arguments {
  at::TensorList params;
  const std::vector<at::Tensor>& grads;  // undefined where there is nothing to do
  at::TensorList momenta, variances;
  const at::Tensor &groups, &components, &scales, &hyper;
  bool norms;
  at::Device device;
};

// The schedule for these arguments, from the last time or made anew. For one thread at a time.
Schedule& schedule_for(const Arguments&);

// A number that changes where a tensor is written to.
int64_t version_of(const at::Tensor&);

}  // namespace cuda
}  // namespace mk
