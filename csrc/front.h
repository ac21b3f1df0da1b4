// The operator for Python's loops.
#pragma once

#include <pybind11/pybind11.h>

namespace mk {

void define_front(pybind11::module_& m);

}  // namespace mk
