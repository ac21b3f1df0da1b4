"""What the steps of rows, PSI's and those on G(1, n), read: ``LANES`` rows, ``BLOCK`` elements of each at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton.addressing import address, offsets
from manifold_kernels.triton.arithmetic import divide
from manifold_kernels.triton.tables import (
    AXES_WIDTH,
    DIVISOR,
    GRAD,
    GROUP_FIRST,
    GROUP_HYPER,
    GROUP_WIDTH,
    HYPER_WIDTH,
    MOMENTUM_BUFFER,
    PARAMETER_WIDTH,
    STEPS,
    TILE_AXES,
    TILE_COUNT,
    TILE_FIRST,
    TILE_GROUP,
    TILE_PARAMETER,
    TILE_WIDTH,
    WEIGHT,
)


@triton.jit
def place(
    tiles,
    parameters,
    axes,
    groups,
    components,
    hyper,
    STORE: tl.constexpr,
    LISTED: tl.constexpr,
    SAME: tl.constexpr,
    RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    DIMS_0: tl.constexpr,
    LANES: tl.constexpr,
):
    """This program's parameter, its rows, which of them there are, hyper-parameters, and where :func:`piece` reads."""
    tile = tiles + tl.program_id(0) * TILE_WIDTH
    parameter = tl.load(tile + TILE_PARAMETER)
    group = groups + tl.load(tile + TILE_GROUP) * GROUP_WIDTH
    own_axes = axes + tl.load(tile + TILE_AXES) * AXES_WIDTH
    tensor = parameters + parameter * PARAMETER_WIDTH
    h = hyper + tl.load(group + GROUP_HYPER) * HYPER_WIDTH
    lane = tl.arange(0, LANES)
    inside = lane < tl.load(tile + TILE_COUNT).to(tl.int32)
    component = tl.load(group + GROUP_FIRST).to(tl.int32) + tl.load(tile + TILE_FIRST).to(tl.int32) + lane
    if LISTED:
        component = tl.load(components + component, mask=inside, other=0).to(tl.int32)
    weights = address(tensor + WEIGHT, STORE, RUN >= 0)
    grads = address(tensor + GRAD, STORE, RUN >= 0)
    buffers = address(tensor + MOMENTUM_BUFFER, STORE, RUN >= 0)
    first_step = tl.load(address(tensor + STEPS, tl.int64, False)) == 0
    lanes = offsets(own_axes, 0, component, DIMS_0, SAME, RUN, ALIGN)
    return parameter, component, inside, h, (own_axes, weights, grads, buffers, lanes, inside, first_step, h)


@triton.jit
def piece(
    source,
    k,
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
    """Weight, gradient, buffer (0 at the first step, or without one), and offsets and mask of block k of ``source``."""
    own_axes, weights, grads, buffers, lanes, inside, first_step, h = source
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
