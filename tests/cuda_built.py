"""Checks what ``make cuda-build`` has installed: ``python tests/cuda_built.py``, by the Python that has it."""

import sys

import torch

from manifold_kernels import info, ops

if (error := ops.extension_error()) is not None:
    sys.exit(f"cuda-build: wanted the compiled extension, got: {error}")
for key in ("CPU", "CUDA"):
    if not torch._C._dispatch_has_kernel_for_dispatch_key("manifold_kernels::step_", key):
        sys.exit(f"cuda-build: wanted the operator step_ for {key}, got none.")
print(f"the operator step_ is registered for CPU and CUDA; {info.build()}")
