"""Batched QR and polar decompositions: the operators of :mod:`manifold_kernels.decompositions` in Triton.

``decompose`` has the kernels. Matrices are padded to powers of two, of which a program holds as many as fit.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from manifold_kernels.triton import decompose
from manifold_kernels.triton.launch import OPTIONS
from manifold_kernels.triton.planning import INTERPRETED, Kernel, power_above, warps_of

#: Bytes of a program's matrices, padding included, and the most that a matrix may have: larger ones would spill.
BLOCK = 2**17 if INTERPRETED else 2**12
LARGEST = 2**14


def fits(x: Tensor) -> bool:
    """Whether matrices of the size of ``x`` have kernels."""
    return _padded_bytes(x) <= LARGEST


def _padded_bytes(x: Tensor) -> int:
    return power_above(x.shape[-2]) * power_above(x.shape[-1]) * x.dtype.itemsize


def planned(function: Any, x: Tensor, **constants: Any) -> tuple[Kernel, int]:
    """``function`` with its constants for the matrices of ``x``, and how many programs they take."""
    n, p = x.shape[-2:]
    count = math.prod(x.shape[:-2])
    lanes = min(max(BLOCK // _padded_bytes(x), 1), power_above(count))
    sizes = {"N": n, "P": p, "ROWS": power_above(n), "COLUMNS": power_above(p), "LANES": lanes, **constants}
    kernel = Kernel(function, tuple(sizes.items()), warps_of(lanes * _padded_bytes(x), 32))
    return kernel, triton.cdiv(count, lanes)


def _launch(function: Any, x: Tensor, *outputs: Tensor, **constants: Any) -> None:
    kernel, programs = planned(function, x, **constants)
    if programs == 0:
        return
    options = {} if INTERPRETED else {**OPTIONS, "num_warps": kernel.warps}
    with (
        torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext(),
        np.errstate(all="ignore") if INTERPRETED else nullcontext(),
    ):
        kernel.function[(programs,)](x, *outputs, math.prod(x.shape[:-2]), **dict(kernel.constants), **options)


def qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x = q r``, the diagonal of r >= 0."""
    n, p = x.shape[-2:]
    k = min(n, p)
    q, r = x.new_empty((*x.shape[:-2], n, k)), x.new_empty((*x.shape[:-2], k, p))
    _launch(decompose.qr, x.contiguous(), q, r, WITH_R=True)
    return q, r


def qf(x: Tensor) -> Tensor:
    """The q of :func:`qr` alone."""
    n, p = x.shape[-2:]
    q = x.new_empty((*x.shape[:-2], n, min(n, p)))
    _launch(decompose.qr, x.contiguous(), q, q, WITH_R=False)
    return q


def polar(x: Tensor) -> Tensor:
    """``x (x^T x)^{-1/2}``, of the transposed matrices where n < p."""
    wide = x.shape[-2] < x.shape[-1]
    tall = (x.mT if wide else x).contiguous()
    q = torch.empty_like(tall)
    _launch(decompose.polar, tall, q)
    return q.mT.contiguous() if wide else q
