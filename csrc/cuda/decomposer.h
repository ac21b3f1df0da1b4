// The operators of decompositions.py on a GPU.
#pragma once

#include "functional.h"

namespace mk {
namespace cuda {

extern const Decomposer on_gpu;

}  // namespace cuda
}  // namespace mk
