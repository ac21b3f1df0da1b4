"""Counts the multiply-adds that compilers make of ``x y + z`` and one ``fma``, with a kernel's options and with fusion
allowed, as JSON; run in a process of its own, without the interpreter: ``python tests/triton_fused.py TARGET...``."""

from __future__ import annotations

import json
import sys

import triton
import triton.language as tl

from manifold_kernels.triton.compiling import compile_kernel
from manifold_kernels.triton.launch import OPTIONS
from manifold_kernels.triton.planning import Kernel


@triton.jit
def probe(numbers):
    at = tl.arange(0, 32)
    x, y, z = tl.load(numbers + at), tl.load(numbers + 32 + at), tl.load(numbers + 64 + at)
    tl.store(numbers + at, x * y + z)
    tl.store(numbers + 32 + at, tl.fma(x, z, y))


if __name__ == "__main__":
    for target in sys.argv[1:]:
        for numbers in ("*fp32", "*fp64"):
            pinned, fused = (
                compile_kernel(Kernel(probe, (), 1), target, {"numbers": numbers}, options).multiply_adds
                for options in (OPTIONS, {"enable_fp_fusion": True})
            )
            print(json.dumps({"target": target, "numbers": numbers, "pinned": pinned, "fused": fused}))
