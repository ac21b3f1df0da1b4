"""The step of many small matrices: lanes are components, their elements are unrolled. One kernel, any manifold."""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton import momentum as sgd
from manifold_kernels.triton import step_size
from manifold_kernels.triton.addressing import address, offsets
from manifold_kernels.triton.arithmetic import divide, finite, power_of_two, root
from manifold_kernels.triton.tables import (
    AXES_WIDTH,
    DIVISOR,
    FOUND_INF,
    GRAD,
    GROUP_FIRST,
    GROUP_HYPER,
    GROUP_SCALE,
    GROUP_SCALE_STRIDE,
    GROUP_WIDTH,
    HYPER_WIDTH,
    MEASURE,
    MOMENTUM_BUFFER,
    PARAMETER_WIDTH,
    STEPS,
    TILE_AXES,
    TILE_COUNT,
    TILE_FIRST,
    TILE_GROUP,
    TILE_PARAMETER,
    TILE_PARTIAL,
    TILE_WIDTH,
    WEIGHT,
    WEIGHT_DECAY,
)


@triton.jit
def write(
    pointers,
    new,
    old,
    own_axes,
    lanes,
    ok,
    inside,
    N: tl.constexpr,
    P: tl.constexpr,
    SAME: tl.constexpr,
    RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    DIMS_1: tl.constexpr,
    DIMS_2: tl.constexpr,
    WHICH: tl.constexpr,
):
    """Elements to their places where ``ok``. In 16-byte stores what stays is written back: a mask of its own for every
    lane would make them single ones."""
    for i in tl.static_range(N):
        row = offsets(own_axes, 1, tl.full((), i, tl.int32), DIMS_1, SAME, RUN, ALIGN)
        for j in tl.static_range(P):
            column = offsets(own_axes, 2, tl.full((), j, tl.int32), DIMS_2, SAME, RUN, ALIGN)
            at = pointers + (lanes + (row[WHICH] + column[WHICH]))
            if RUN >= 0:
                tl.store(at, tl.where(ok, new[i * P + j], old[i * P + j]), mask=inside)
            else:
                tl.store(at, new[i * P + j], mask=ok)


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
    project: tl.constexpr,
    retract: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    LONGEST: tl.constexpr,
    STORE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BUFFERED: tl.constexpr,
    NESTEROV: tl.constexpr,
    DIVIDED: tl.constexpr,
    DECAY: tl.constexpr,
    THROUGH: tl.constexpr,
    INDIVIDUAL: tl.constexpr,
    BOUNDED: tl.constexpr,
    NORMS: tl.constexpr,
    LISTED: tl.constexpr,
    SAME: tl.constexpr,
    RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    DIMS_0: tl.constexpr,
    DIMS_1: tl.constexpr,
    DIMS_2: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
):
    """One block of components of one group: momentum, projection, norm, step size, retraction ([FG] Algorithm 1)."""
    tile = tiles + tl.program_id(0) * TILE_WIDTH
    parameter = tl.load(tile + TILE_PARAMETER)
    group = groups + tl.load(tile + TILE_GROUP) * GROUP_WIDTH
    own_axes = axes + tl.load(tile + TILE_AXES) * AXES_WIDTH
    tensor = parameters + parameter * PARAMETER_WIDTH
    h = hyper + tl.load(group + GROUP_HYPER) * HYPER_WIDTH
    if DIVIDED:
        if tl.load(h + FOUND_INF) != 0:
            return

    count = tl.multiple_of(tl.load(tile + TILE_COUNT).to(tl.int32), ALIGN)
    first = tl.multiple_of(tl.load(tile + TILE_FIRST).to(tl.int32), ALIGN)
    lane = tl.arange(0, LANES)
    inside = lane < count
    position = first + lane
    start = tl.load(group + GROUP_FIRST)
    if LISTED:
        component = tl.load(components + start + position, mask=inside, other=0).to(tl.int32)
    else:
        component = tl.multiple_of(start.to(tl.int32), ALIGN) + position
    s = tl.load(
        scales + tl.load(group + GROUP_SCALE) + position * tl.load(group + GROUP_SCALE_STRIDE), mask=inside, other=1.0
    )
    if LONGEST == 0:
        s = tl.full((LANES,), 1.0, tl.float64)  # the Euclidean space has no scale

    weights = address(tensor + WEIGHT, STORE, RUN >= 0)
    grads = address(tensor + GRAD, STORE, RUN >= 0)
    buffers = address(tensor + MOMENTUM_BUFFER, STORE, RUN >= 0)
    first_step = tl.load(address(tensor + STEPS, tl.int64, False)) == 0
    theta, keep = sgd.coefficients(h, COMPUTE)
    aw, ag, am = offsets(own_axes, 0, component, DIMS_0, SAME, RUN, ALIGN)

    w = ()
    g = ()
    m = ()
    kept = ()
    olds = ()
    ok = inside
    top = tl.zeros((LANES,), COMPUTE)
    for i in tl.static_range(N):
        rw, rg, rm = offsets(own_axes, 1, tl.full((), i, tl.int32), DIMS_1, SAME, RUN, ALIGN)
        for j in tl.static_range(P):
            cw, cg, cm = offsets(own_axes, 2, tl.full((), j, tl.int32), DIMS_2, SAME, RUN, ALIGN)
            stored = tl.load(weights + (aw + (rw + cw)), mask=inside, other=0.0)
            if RUN >= 0:
                kept = kept + (stored,)
            we = stored.to(COMPUTE)
            ge = tl.load(grads + (ag + (rg + cg)), mask=inside, other=0.0).to(COMPUTE)
            if DIVIDED:
                ge = divide(ge, tl.load(h + DIVISOR).to(COMPUTE))
            if DECAY:
                ge = tl.fma(we, tl.load(h + WEIGHT_DECAY).to(COMPUTE), ge)
            ok = ok & finite(we) & finite(ge)
            top = tl.maximum(top, tl.abs(ge))
            w = w + (we,)
            g = g + (ge,)
            if BUFFERED:
                old = tl.load(buffers + (am + (rm + cm)), mask=inside, other=0.0)
                if RUN >= 0:
                    olds = olds + (old,)
                me = sgd.buffer(ge, old.to(COMPUTE), first_step, theta, keep, STORE)
                ok = ok & finite(me.to(COMPUTE))
                top = tl.maximum(top, tl.abs(me.to(COMPUTE)))
                m = m + (me,)
    if THROUGH:
        ok = inside

    # Divided by a power of two c, so that no square overflows; in units of s.
    if THROUGH:
        top = tl.full((LANES,), 1.0, COMPUTE)  # element by element, as torch
    c, inverse_c = power_of_two(top)
    unit = divide(tl.full((LANES,), 1.0, COMPUTE), s.to(COMPUTE))
    q = ()
    d = ()
    for e in tl.static_range(N * P):
        me = m[e].to(COMPUTE) if BUFFERED else g[e]
        de = sgd.direction(g[e], me, theta, inverse_c, BUFFERED, NESTEROV)
        q = q + (tl.where(ok, w[e] * unit, 0.0),)
        d = d + (tl.where(ok, de, 0.0),)
    xi, square = project(q, d, N, P)

    wide_c = c.to(tl.float64)
    wide = square.to(tl.float64) * (wide_c * wide_c)
    if not THROUGH:
        wide = tl.where(ok, wide, 0.0)
    if MODE == MEASURE:
        tl.store(partials + tl.load(tile + TILE_PARTIAL), tl.sum(wide, 0))
    else:
        r_square = step_size.norm_square(wide, tile, totals, INDIVIDUAL, MODE)
        if NORMS:
            step_size.write_norms(r_square, ok, position, inside, tile, group, norms, INDIVIDUAL, THROUGH)
        along = step_size.rate(r_square, h, BOUNDED) * wide_c / s
        if LONGEST > 0:
            along = tl.minimum(along, LONGEST / tl.maximum(root(square).to(tl.float64), 1e-20))
        if BUFFERED:
            write(buffers, m, olds, own_axes, am, ok, inside, N, P, SAME, RUN, ALIGN, DIMS_1, DIMS_2, 2)
        y = retract(q, xi, -along.to(COMPUTE), square, N, P)
        moved = ()
        for e in tl.static_range(N * P):
            moved = moved + ((y[e] * s.to(COMPUTE)).to(STORE),)
        write(weights, moved, kept, own_axes, aw, ok, inside, N, P, SAME, RUN, ALIGN, DIMS_1, DIMS_2, 0)
        if not THROUGH:
            left = tl.sum((inside & (~ok)).to(tl.int32), 0)
            tl.atomic_add(nonfinite + parameter, left.to(tl.int64), mask=left > 0)
