"""What the steps of rows, PSI's and those on G(1, n), read: ``LANES`` rows, ``BLOCK`` elements of each at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton.addressing import offsets
from manifold_kernels.triton.arithmetic import divide
from manifold_kernels.triton.tables import DIVISOR


@triton.jit
def piece(
    own_axes,
    k,
    weights,
    grads,
    buffers,
    lanes,
    inside,
    first_step,
    h,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    BUFFERED: tl.constexpr,
    DIVIDED: tl.constexpr,
    SAME: tl.constexpr,
    RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    DIMS_1: tl.constexpr,
):
    """Weight, gradient, buffer (0 at the first step, or without one), and offsets and mask of block k."""
    element = k * BLOCK + tl.arange(0, BLOCK)
    rw, rg, rm = offsets(own_axes, 1, element, DIMS_1, SAME, RUN, ALIGN)
    mask = inside[:, None] & (element < N)[None, :]
    ow = lanes[0][:, None] + rw[None, :]
    om = lanes[2][:, None] + rm[None, :]
    w = tl.load(weights + ow, mask=mask, other=0.0).to(COMPUTE)
    g = tl.load(grads + (lanes[1][:, None] + rg[None, :]), mask=mask, other=0.0).to(COMPUTE)
    if DIVIDED:
        g = divide(g, tl.load(h + DIVISOR).to(COMPUTE))
    if BUFFERED:
        u = tl.load(buffers + om, mask=mask & (~first_step), other=0.0).to(COMPUTE)
    else:
        u = tl.zeros_like(w)
    return w, g, u, ow, om, mask


@triton.jit
def largest(x):
    """The largest magnitude of each row."""
    return tl.max(tl.abs(x), 1)


@triton.jit
def broken(x):
    """1 for rows with NaN or Inf."""
    return tl.max((~(tl.abs(x) < float("inf"))).to(tl.int32), 1)
