// The operators of decompositions.py on any device: argument checks, what goes to kernels and what to torch. No
// mathematics.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "batch.h"

namespace mk {

// What a device has for them.
struct Decomposer {
  // Whether there is a kernel; torch's linear algebra takes what has none.
  bool (*has_kernel)(Decomposition, const Batch&, at::Device);
  // On a batch of at least one matrix, n >= p for polar.
  void (*run)(Decomposition, const Batch&, at::Device);
};

std::tuple<at::Tensor, at::Tensor> qr(const at::Tensor& x, const Decomposer& by);
at::Tensor qf(const at::Tensor& x, const Decomposer& by);
at::Tensor polar(const at::Tensor& x, const Decomposer& by);

}  // namespace mk
