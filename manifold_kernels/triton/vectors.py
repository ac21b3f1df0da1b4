"""The step of vectors: spheres of any length, columns of oblique matrices, bounded Euclidean components.

A program holds ``LANES`` components, ``COLUMNS`` columns of each and ``BLOCK`` elements of these at a time. Vectors of
one block are read once; longer ones are read again for each sum that the next one needs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton import momentum as sgd
from manifold_kernels.triton import step_size
from manifold_kernels.triton.addressing import address, offsets
from manifold_kernels.triton.arithmetic import divide, finite, inverse_root, power_of_two, root
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
    TILE_COLUMN,
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
def spread(lanes, columns, elements):
    """Offsets of ``(lane, column, element)``."""
    return (lanes[:, None] + columns[None, :])[:, :, None] + elements[None, None, :]


@triton.jit
def piece(
    source,
    k,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    STORE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BUFFERED: tl.constexpr,
    DIVIDED: tl.constexpr,
    DECAY: tl.constexpr,
    SAME: tl.constexpr,
    RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    DIMS_1: tl.constexpr,
):
    """Weight, gradient, new momentum (or the gradient) in storage type, offsets and mask of block k of ``source``."""
    own_axes, weights, grads, buffers, lanes, columns, inside, h, first_step = source
    element = k * BLOCK + tl.arange(0, BLOCK)
    rw, rg, rm = offsets(own_axes, 1, element, DIMS_1, SAME, RUN, ALIGN)
    mask = inside[:, :, None] & (element < N)[None, None, :]
    ow = spread(lanes[0], columns[0], rw)
    om = spread(lanes[2], columns[2], rm)
    w = tl.load(weights + ow, mask=mask, other=0.0).to(COMPUTE)
    g = tl.load(grads + spread(lanes[1], columns[1], rg), mask=mask, other=0.0).to(COMPUTE)
    if DIVIDED:
        g = divide(g, tl.load(h + DIVISOR).to(COMPUTE))
    if DECAY:
        g = tl.fma(w, tl.load(h + WEIGHT_DECAY).to(COMPUTE), g)
    if BUFFERED:
        theta, keep = sgd.coefficients(h, COMPUTE)
        old = tl.load(buffers + om, mask=mask & (~first_step), other=0.0).to(COMPUTE)
        m = sgd.buffer(g, old, first_step, theta, keep, STORE)
    else:
        m = g.to(STORE)
    return w, g, m, ow, om, mask


@triton.jit
def worst(x):
    """The largest over columns and elements, for each lane."""
    return tl.max(tl.max(x, 2), 1)


@triton.jit
def point_and_direction(
    w, g, m, ok, unit, inverse_c, h, COMPUTE: tl.constexpr, BUFFERED: tl.constexpr, NESTEROV: tl.constexpr
):
    """q and d of the step, zero where a component does not move."""
    theta, _ = sgd.coefficients(h, COMPUTE)
    d = sgd.direction(g, m.to(COMPUTE), theta, inverse_c[:, None, None], BUFFERED, NESTEROV)
    here = ok[:, None, None]
    return tl.where(here, w * unit[:, None, None], 0.0), tl.where(here, d, 0.0)


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
    arc: tl.constexpr,
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
    FLAT: tl.constexpr,
    SPLIT: tl.constexpr,
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
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of components of one group, or (``SPLIT``) some columns of a group's only component; ``FLAT``: of the
    Euclidean space, where nothing is projected or normalised."""
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    tile = tiles + tl.program_id(0) * TILE_WIDTH
    parameter = tl.load(tile + TILE_PARAMETER)
    group = groups + tl.load(tile + TILE_GROUP) * GROUP_WIDTH
    own_axes = axes + tl.load(tile + TILE_AXES) * AXES_WIDTH
    tensor = parameters + parameter * PARAMETER_WIDTH
    h = hyper + tl.load(group + GROUP_HYPER) * HYPER_WIDTH
    if DIVIDED:
        if tl.load(h + FOUND_INF) != 0:
            return

    lane = tl.arange(0, LANES)
    inside = lane < tl.load(tile + TILE_COUNT).to(tl.int32)
    position = tl.load(tile + TILE_FIRST).to(tl.int32) + lane
    start = tl.load(group + GROUP_FIRST)
    if LISTED:
        component = tl.load(components + start + position, mask=inside, other=0).to(tl.int32)
    else:
        component = start.to(tl.int32) + position
    s = tl.load(
        scales + tl.load(group + GROUP_SCALE) + position * tl.load(group + GROUP_SCALE_STRIDE), mask=inside, other=1.0
    )
    if LONGEST == 0:
        s = tl.full((LANES,), 1.0, tl.float64)  # the Euclidean space has no scale
    column = tl.load(tile + TILE_COLUMN).to(tl.int32) + tl.arange(0, COLUMNS)
    inside_columns = inside[:, None] & (column < P)[None, :]

    weights = address(tensor + WEIGHT, STORE, RUN >= 0)
    grads = address(tensor + GRAD, STORE, RUN >= 0)
    buffers = address(tensor + MOMENTUM_BUFFER, STORE, RUN >= 0)
    first_step = tl.load(address(tensor + STEPS, tl.int64, False)) == 0
    at_lane = offsets(own_axes, 0, component, DIMS_0, SAME, RUN, ALIGN)
    at_column = offsets(own_axes, 2, column, DIMS_2, SAME, RUN, ALIGN)
    source = own_axes, weights, grads, buffers, at_lane, at_column, inside_columns, h, first_step

    top = tl.zeros((LANES,), COMPUTE)
    bad = tl.zeros((LANES,), tl.int32)
    for k in range(BLOCKS):
        w, g, m, ow, om, mask = piece(
            source, k, N, BLOCK, STORE, COMPUTE, BUFFERED, DIVIDED, DECAY, SAME, RUN, ALIGN, DIMS_1
        )
        unbroken = finite(w) & finite(g) & finite(m.to(COMPUTE))
        bad = tl.maximum(bad, worst((~unbroken).to(tl.int32)))
        top = tl.maximum(top, worst(tl.maximum(tl.abs(g), tl.abs(m.to(COMPUTE)))))
    ok = inside & (bad == 0)
    if THROUGH:
        ok = inside
        top = tl.full((LANES,), 1.0, COMPUTE)  # element by element, as torch

    # Divided by a power of two c, so that no square overflows; in units of s.
    c, inverse_c = power_of_two(top)
    unit = divide(tl.full((LANES,), 1.0, COMPUTE), s.to(COMPUTE))
    along = tl.zeros((LANES, COLUMNS), COMPUTE)
    if not FLAT:
        for k in range(BLOCKS):
            w, g, m, ow, om, mask = piece(
                source, k, N, BLOCK, STORE, COMPUTE, BUFFERED, DIVIDED, DECAY, SAME, RUN, ALIGN, DIMS_1
            )
            q, d = point_and_direction(w, g, m, ok, unit, inverse_c, h, COMPUTE, BUFFERED, NESTEROV)
            along += tl.sum(q * d, 2)
    squares = tl.zeros((LANES, COLUMNS), COMPUTE)
    for k in range(BLOCKS):
        w, g, m, ow, om, mask = piece(
            source, k, N, BLOCK, STORE, COMPUTE, BUFFERED, DIVIDED, DECAY, SAME, RUN, ALIGN, DIMS_1
        )
        q, d = point_and_direction(w, g, m, ok, unit, inverse_c, h, COMPUTE, BUFFERED, NESTEROV)
        xi = tl.fma(-along[:, :, None], q, d)
        squares += tl.sum(xi * xi, 2)
    square = tl.sum(squares, 1)

    wide_c = c.to(tl.float64)
    wide = square.to(tl.float64) * (wide_c * wide_c)
    if not THROUGH:
        # The only component of a group does not step unless all of its pieces can: NaN says so to the others.
        wide = tl.where(ok, wide, tl.where(inside, float("nan") if SPLIT else 0.0, 0.0))
    if MODE == MEASURE:
        tl.store(partials + tl.load(tile + TILE_PARTIAL), tl.sum(wide, 0))
    else:
        r_square = step_size.norm_square(wide, tile, totals, INDIVIDUAL, MODE)
        if NORMS:
            step_size.write_norms(r_square, ok, position, inside, tile, group, norms, INDIVIDUAL, THROUGH)
        if SPLIT:
            ok = ok & (r_square == r_square)
        per_length = step_size.rate(r_square, h, BOUNDED) * wide_c / s
        if LONGEST > 0:
            per_length = tl.minimum(per_length, LONGEST / tl.maximum(root(square).to(tl.float64), 1e-20))
        stride = -per_length.to(COMPUTE)
        a, b = arc(stride[:, None], squares)
        lengths = tl.zeros((LANES, COLUMNS), COMPUTE)
        bad = tl.zeros((LANES,), tl.int32)
        for k in range(BLOCKS):
            w, g, m, ow, om, mask = piece(
                source, k, N, BLOCK, STORE, COMPUTE, BUFFERED, DIVIDED, DECAY, SAME, RUN, ALIGN, DIMS_1
            )
            q, d = point_and_direction(w, g, m, ok, unit, inverse_c, h, COMPUTE, BUFFERED, NESTEROV)
            y = tl.fma(b[:, :, None], tl.fma(-along[:, :, None], q, d), a[:, :, None] * q)
            if FLAT:
                bad = tl.maximum(bad, worst((~finite(y.to(STORE).to(COMPUTE))).to(tl.int32)))
            else:
                lengths += tl.sum(y * y, 2)
        size = s.to(COMPUTE)[:, None]
        if FLAT:
            if not THROUGH:
                ok = ok & (bad == 0)
        else:
            size = size * inverse_root(lengths)
        for k in range(BLOCKS):
            w, g, m, ow, om, mask = piece(
                source, k, N, BLOCK, STORE, COMPUTE, BUFFERED, DIVIDED, DECAY, SAME, RUN, ALIGN, DIMS_1
            )
            q, d = point_and_direction(w, g, m, ok, unit, inverse_c, h, COMPUTE, BUFFERED, NESTEROV)
            y = tl.fma(b[:, :, None], tl.fma(-along[:, :, None], q, d), a[:, :, None] * q)
            moves = mask & ok[:, None, None]
            tl.store(weights + ow, (y * size[:, :, None]).to(STORE), mask=moves)
            if BUFFERED:
                tl.store(buffers + om, m, mask=moves)
        if not THROUGH:
            left = tl.sum((inside & (~ok)).to(tl.int32), 0)
            if SPLIT:
                left = left * tl.load(tile + TILE_LEADS).to(tl.int32)
            tl.atomic_add(nonfinite + parameter, left.to(tl.int64), mask=left > 0)
