"""Euclidean groups without a bound on the step size, element by element: torch.optim.SGD."""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton import momentum as sgd
from manifold_kernels.triton import step_size
from manifold_kernels.triton.addressing import address, offsets
from manifold_kernels.triton.arithmetic import divide, finite
from manifold_kernels.triton.tables import (
    AXES_WIDTH,
    DIVISOR,
    FOUND_INF,
    GRAD,
    GROUP_FIRST,
    GROUP_HYPER,
    GROUP_WIDTH,
    HYPER_WIDTH,
    LR,
    MEASURE,
    MOMENTUM_BUFFER,
    PARAMETER_WIDTH,
    STEP,
    STEPS,
    TILE_AXES,
    TILE_COUNT,
    TILE_FIRST,
    TILE_GROUP,
    TILE_LEADS,
    TILE_PARAMETER,
    TILE_PARTIAL,
    TILE_WIDTH,
    WEIGHT,
    WEIGHT_DECAY,
)


@triton.jit
def step(
    tiles,
    parameters,
    axes,
    groups,
    components,
    scales,
    hyper,
    partials,
    totals,
    norms,
    nonfinite,
    SIZE: tl.constexpr,
    STORE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BUFFERED: tl.constexpr,
    NESTEROV: tl.constexpr,
    DIVIDED: tl.constexpr,
    DECAY: tl.constexpr,
    BOUNDED: tl.constexpr,
    NORMS: tl.constexpr,
    LISTED: tl.constexpr,
    WHOLE: tl.constexpr,
    SAME: tl.constexpr,
    RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    DIMS_0: tl.constexpr,
    DIMS_1: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``W <- W - (lr/tau) d`` for elements ``[first, first + count)`` of a group whose components have ``SIZE`` each.

    ``WHOLE``: of its only component, which with ``BOUNDED`` steps as a whole or not at all.
    """
    tile = tiles + tl.program_id(0) * TILE_WIDTH
    parameter = tl.load(tile + TILE_PARAMETER)
    group = groups + tl.load(tile + TILE_GROUP) * GROUP_WIDTH
    own_axes = axes + tl.load(tile + TILE_AXES) * AXES_WIDTH
    tensor = parameters + parameter * PARAMETER_WIDTH
    h = hyper + tl.load(group + GROUP_HYPER) * HYPER_WIDTH
    if DIVIDED:
        if tl.load(h + FOUND_INF) != 0:
            return

    lane = tl.arange(0, BLOCK)
    inside = lane < tl.multiple_of(tl.load(tile + TILE_COUNT), ALIGN)
    element = tl.multiple_of(tl.load(tile + TILE_FIRST), ALIGN) + lane
    if WHOLE:
        ow, og, om = offsets(own_axes, 1, element, DIMS_1, SAME, RUN, ALIGN)
    else:
        start = tl.load(group + GROUP_FIRST)
        component = element // SIZE
        if LISTED:
            component = tl.load(components + start + component, mask=inside, other=0)
        else:
            component += start
        aw, ag, am = offsets(own_axes, 0, component, DIMS_0, SAME, RUN, ALIGN)
        rw, rg, rm = offsets(own_axes, 1, element % SIZE, DIMS_1, SAME, RUN, ALIGN)
        ow, og, om = aw + rw, ag + rg, am + rm

    weights = address(tensor + WEIGHT, STORE, RUN >= 0)
    buffers = address(tensor + MOMENTUM_BUFFER, STORE, RUN >= 0)
    first_step = tl.load(address(tensor + STEPS, tl.int64, False)) == 0
    theta, keep = sgd.coefficients(h, COMPUTE)
    w = tl.load(weights + ow, mask=inside, other=0.0).to(COMPUTE)
    d = tl.load(address(tensor + GRAD, STORE, RUN >= 0) + og, mask=inside, other=0.0).to(COMPUTE)
    if DIVIDED:
        d = divide(d, tl.load(h + DIVISOR).to(COMPUTE))
    if DECAY:
        d = tl.fma(w, tl.load(h + WEIGHT_DECAY).to(COMPUTE), d)
    unbroken = finite(w) & finite(d)
    if BUFFERED:
        old = tl.load(buffers + om, mask=inside & (~first_step), other=0.0).to(COMPUTE)
        m = sgd.buffer(d, old, first_step, theta, keep, STORE)
        unbroken = unbroken & finite(m.to(COMPUTE))
        d = sgd.direction(d, m.to(COMPUTE), theta, 1.0, BUFFERED, NESTEROV)

    if NORMS or BOUNDED:
        wide = d.to(tl.float64)
        if BOUNDED:
            # NaN says to the other pieces that the component does not step.
            wide = tl.where(unbroken, wide, float("nan"))
        wide = tl.sum(tl.where(inside, wide * wide, 0.0), 0)
    if MODE == MEASURE:
        tl.store(partials + tl.load(tile + TILE_PARTIAL), wide)
    else:
        moves = inside
        minus_lr = -tl.load(h + LR)
        if NORMS or BOUNDED:
            if MODE == STEP:
                wide = tl.load(totals + tl.load(tile + TILE_GROUP))
            if NORMS:
                here = tl.load(tile + TILE_LEADS) != 0
                step_size.write_norm(wide, here, group, norms, not BOUNDED)
            if BOUNDED:
                minus_lr = -step_size.rate(wide, h, True)
                moves = moves & (wide == wide)
                left = (wide != wide).to(tl.int64) * tl.load(tile + TILE_LEADS)
                tl.atomic_add(nonfinite + parameter, left, mask=left > 0)
        tl.store(weights + ow, tl.fma(d, minus_lr.to(COMPUTE), w).to(STORE), mask=moves)
        if BUFFERED:
            tl.store(buffers + om, m, mask=moves)
