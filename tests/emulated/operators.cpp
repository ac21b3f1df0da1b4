// The CUDA backend on CPU tensors, as torch.ops.manifold_kernels_emulated.
#include <torch/library.h>

#include "cuda/decomposer.h"
#include "cuda/kernels.h"
#include "cuda/step.h"
#include "emulator.h"

namespace {

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const mk::cuda::Kernel& kernel : mk::cuda::kernels()) names.push_back(kernel.name());
  return names;
}

}  // namespace

TORCH_LIBRARY(manifold_kernels_emulated, m) {
  m.def(
      "step_(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] momenta, Tensor(c!)[] variances, Tensor(d!) steps, "
      "Tensor(e!) nonfinite, Tensor groups, Tensor components, Tensor scales, Tensor hyper, Tensor(f!)? norms=None, "
      "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? live=None) -> ()");
  m.def("qr(Tensor x) -> (Tensor q, Tensor r)");
  m.def("qf(Tensor x) -> Tensor");
  m.def("polar(Tensor x) -> Tensor");
  m.def("set_schedule(int seed) -> ()", [](int64_t seed) { emulator::set_schedule(unsigned(seed)); });
  m.def("set_shared_memory(int bytes) -> ()", [](int64_t bytes) { emulator::shared_memory = size_t(bytes); });
  m.def("set_capturing(bool wanted) -> ()", [](bool wanted) { emulator::set_capturing(wanted); });
  m.def("replay() -> ()", [] { emulator::replay(); });
  m.def("kernel_names() -> str[]", kernel_names);
  m.def("launched() -> int[]", [] { return emulator::launched(); });
}

TORCH_LIBRARY_IMPL(manifold_kernels_emulated, CPU, m) {
  m.impl("step_", &mk::cuda::step_);
  m.impl("qr", [](const at::Tensor& x) { return mk::qr(x, mk::cuda::on_gpu); });
  m.impl("qf", [](const at::Tensor& x) { return mk::qf(x, mk::cuda::on_gpu); });
  m.impl("polar", [](const at::Tensor& x) { return mk::polar(x, mk::cuda::on_gpu); });
}
