// What the operator asks of the device: nothing else of csrc/cuda on the host's side knows whether there is one.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>

#include "cuda/kernels.h"

namespace mk {
namespace cuda {

// Of the device that is current.
Stream current_stream(at::Device);
bool is_capturing(at::Device);              // into a CUDA graph
size_t shared_memory_of_block(at::Device);  // that is dynamic, at most

}  // namespace cuda
}  // namespace mk
