// The operators for tensors on a GPU; their schemas are defined in ops.py and decompositions.py.
#include <torch/library.h>

#include "cuda/decomposer.h"
#include "cuda/step.h"

TORCH_LIBRARY_IMPL(manifold_kernels, CUDA, m) {
  m.impl("step_", &mk::cuda::step_);
  m.impl("qr", [](const at::Tensor& x) { return mk::qr(x, mk::cuda::on_gpu); });
  m.impl("qf", [](const at::Tensor& x) { return mk::qf(x, mk::cuda::on_gpu); });
  m.impl("polar", [](const at::Tensor& x) { return mk::polar(x, mk::cuda::on_gpu); });
}
