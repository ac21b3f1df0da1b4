// The operator for Python's loops. `torch.ops` makes a value of any type of every tensor of every list, at four lists a
// step the better part of the time of small networks. This goes straight to the dispatcher, which sees the same call.
#include "front.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <vector>

namespace mk {
namespace {

namespace py = pybind11;

using OptionalTensor = std::optional<at::Tensor>;
using Step = void(at::TensorList, const c10::List<OptionalTensor>&, at::TensorList, at::TensorList, const at::Tensor&,
                  const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                  const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&);

// f(element) for every element of a sequence: a tensor, or null for None.
template <class F>
void each(const py::sequence& given, const char* name, const F& f) {
  const auto fast = py::reinterpret_steal<py::object>(PySequence_Fast(given.ptr(), name));
  if (!fast) throw py::error_already_set();
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast.ptr()); i++) {
    PyObject* const element = PySequence_Fast_GET_ITEM(fast.ptr(), i);
    const bool none = element == Py_None;
    TORCH_CHECK_TYPE(none || THPVariable_Check(element), name, "[", i, "]: wanted a tensor, got ",
                     Py_TYPE(element)->tp_name, ".");
    f(none ? nullptr : &THPVariable_Unpack(element));
  }
}

std::vector<at::Tensor> tensors_of(const py::sequence& given, const char* name) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(given.size());
  each(given, name, [&](const at::Tensor* tensor) {
    TORCH_CHECK_TYPE(tensor, name, ": wanted tensors only, got None.");
    tensors.push_back(*tensor);
  });
  return tensors;
}

void step_(const py::sequence& params, const py::sequence& grads, const py::sequence& momenta,
           const py::sequence& variances, const at::Tensor& steps, const at::Tensor& nonfinite,
           const at::Tensor& groups, const at::Tensor& components, const at::Tensor& scales, const at::Tensor& hyper,
           const OptionalTensor& norms, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
           const OptionalTensor& live) {
  static const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow("manifold_kernels::step_", "").typed<Step>();
  const std::vector<at::Tensor> weights = tensors_of(params, "params");
  const std::vector<at::Tensor> m = tensors_of(momenta, "momenta"), v = tensors_of(variances, "variances");
  c10::List<OptionalTensor> g;
  g.reserve(grads.size());
  each(grads, "grads", [&](const at::Tensor* grad) { g.push_back(grad ? OptionalTensor(*grad) : std::nullopt); });
  const py::gil_scoped_release released;
  const at::AutoDispatchBelowADInplaceOrView no_derivatives;  // a step has none
  handle.call(weights, g, m, v, steps, nonfinite, groups, components, scales, hyper, norms, grad_scale, found_inf,
              live);
}

}  // namespace

void define_front(py::module_& m) {
  const py::arg_v none[] = {py::arg("norms") = py::none(), py::arg("grad_scale") = py::none(),
                            py::arg("found_inf") = py::none(), py::arg("live") = py::none()};
  m.def("step_", torch::wrap_pybind_function(step_), py::arg("params"), py::arg("grads"), py::arg("momenta"),
        py::arg("variances"), py::arg("steps"), py::arg("nonfinite"), py::arg("groups"), py::arg("components"),
        py::arg("scales"), py::arg("hyper"), none[0], none[1], none[2], none[3], "The operator of ops.py.");
}

}  // namespace mk
