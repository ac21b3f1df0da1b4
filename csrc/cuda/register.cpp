// The operator for tensors on a GPU; its schema is defined in ops.py.
#include <torch/library.h>

#include "cuda/step.h"

TORCH_LIBRARY_IMPL(manifold_kernels, CUDA, m) { m.impl("step_", &mk::cuda::step_); }
