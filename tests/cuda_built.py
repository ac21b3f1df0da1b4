"""Checks what ``make cuda-build`` has installed: ``python tests/cuda_built.py``, by the Python that has it."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import ninja
import torch

from manifold_kernels import (
    decompositions,  # noqa: F401, which defines the operators beside step_
    info,
    ops,
)

ROOT = Path(__file__).resolve().parents[1]

#: Operators with kernels for both devices.
OPERATORS = ("step_", "qr", "qf", "polar")
#: CUDA libraries whose headers no source needs; torch's own headers pull them in where too many of those are included.
UNNEEDED = re.compile(r"\S*/(?:cusparse|cusolver[A-Z]?\w*|cublas[A-Z]?\w*|cufft\w*|cudnn(?:_v\d+)?)\.h\b")

if (error := ops.extension_error()) is not None:
    sys.exit(f"cuda-build: wanted the compiled extension, got: {error}")
for operator in OPERATORS:
    for key in ("CPU", "CUDA"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"manifold_kernels::{operator}", key):
            sys.exit(f"cuda-build: wanted the operator {operator} for {key}, got none.")
for folder in ROOT.glob(f"build/objects-*-{torch.__version__}"):
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), "-t", "deps"]
    headers = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if found := sorted(set(UNNEEDED.findall(headers))):
        sys.exit(f"cuda-build: wanted no headers of libraries that nothing here calls, got {', '.join(found)}.")
extension = importlib.util.find_spec("manifold_kernels._C")
assert extension is not None and extension.origin is not None
size = Path(extension.origin).stat().st_size
print(f"{', '.join(OPERATORS)}: registered for CPU and CUDA; {size / 1e6:.1f} MB; {info.build()}")
