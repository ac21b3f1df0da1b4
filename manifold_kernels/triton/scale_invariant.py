"""The PSI quotient of nonzero vectors ([PSI] Eq. 9-11): ``u <- rho u - lr ||w||^2 g``, ``w <- (1 - k) w + u``."""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton.arithmetic import inverse_root, power_of_two, root
from manifold_kernels.triton.rows import broken, largest, piece, place
from manifold_kernels.triton.tables import (
    FOUND_INF,
    GUARD,
    LR,
    MOMENTUM,
    WEIGHT_DECAY,
)


@triton.jit
def moved(
    w,
    g,
    u,
    push,
    inverse_g,
    carry,
    keep,
    size,
    inverse_size,
    STORE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BUFFERED: tl.constexpr,
):
    """The next w and u, both divided by the power of two ``size``, and u as it is stored."""
    next_u = tl.fma(g * inverse_g[:, None], -push[:, None], u * inverse_size[:, None] * carry)
    stored = (next_u * size[:, None]).to(STORE)
    if BUFFERED:
        # The stored u is what is added to w.
        next_u = stored.to(COMPUTE) * inverse_size[:, None]
    return tl.fma(w * inverse_size[:, None], keep[:, None], next_u), next_u, stored


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
    N: tl.constexpr,
    STORE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BUFFERED: tl.constexpr,
    DIVIDED: tl.constexpr,
    LISTED: tl.constexpr,
    SAME: tl.constexpr,
    RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    DIMS_0: tl.constexpr,
    DIMS_1: tl.constexpr,
    DECAY: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of rows of one group."""
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    parameter, _, inside, h, source = place(
        tiles, parameters, axes, groups, components, hyper, STORE, LISTED, SAME, RUN, ALIGN, DIMS_0, LANES
    )
    if DIVIDED:
        if tl.load(h + FOUND_INF) != 0:
            return

    # Where something leaves the range in which squares are safe, everything is divided by a power of two.
    bad = tl.zeros((LANES,), tl.int32)
    top_w = tl.zeros((LANES,), COMPUTE)
    top_g = tl.zeros((LANES,), COMPUTE)
    top_u = tl.zeros((LANES,), COMPUTE)
    for k in range(BLOCKS):
        w, g, u, ow, om, mask = piece(source, k, N, BLOCK, COMPUTE, BUFFERED, DIVIDED, SAME, RUN, ALIGN, DIMS_1)
        bad = tl.maximum(bad, tl.maximum(broken(w), tl.maximum(broken(g), broken(u))))
        top_w = tl.maximum(top_w, largest(w))
        top_g = tl.maximum(top_g, largest(g))
        top_u = tl.maximum(top_u, largest(u))
    c_w, inverse_w = power_of_two(top_w)
    c_g, inverse_g = power_of_two(top_g)
    square = tl.zeros((LANES,), COMPUTE)
    for k in range(BLOCKS):
        w, g, u, ow, om, mask = piece(source, k, N, BLOCK, COMPUTE, BUFFERED, DIVIDED, SAME, RUN, ALIGN, DIMS_1)
        q = w * inverse_w[:, None]
        square += tl.sum(q * q, 1)

    lr = tl.load(h + LR)
    carry = tl.load(h + MOMENTUM)
    wide_square = square.to(tl.float64) * c_w.to(tl.float64) * c_w.to(tl.float64)
    push = lr * wide_square
    if DECAY:
        keep = (1.0 - tl.minimum(push * tl.load(h + WEIGHT_DECAY), 0.5)).to(COMPUTE)
    else:
        keep = tl.full((LANES,), 1.0, COMPUTE)
    far = tl.maximum(tl.maximum(top_w, top_u).to(tl.float64), push * top_g.to(tl.float64))
    LIMIT: tl.constexpr = 2.0**500 if tl.float64 == COMPUTE else 2.0**60
    wide_size, _ = power_of_two(tl.minimum(tl.where(far < LIMIT, 1.0, far), LIMIT * LIMIT * 16))
    size = wide_size.to(COMPUTE)
    inverse_size = (1.0 / wide_size).to(COMPUTE)
    push = (push / wide_size * c_g.to(tl.float64)).to(COMPUTE)

    square = tl.zeros((LANES,), COMPUTE)
    for k in range(BLOCKS):
        w, g, u, ow, om, mask = piece(source, k, N, BLOCK, COMPUTE, BUFFERED, DIVIDED, SAME, RUN, ALIGN, DIMS_1)
        w, u, stored = moved(
            w, g, u, push, inverse_g, carry.to(COMPUTE), keep, size, inverse_size, STORE, COMPUTE, BUFFERED
        )
        square += tl.sum(w * w, 1)
        if BUFFERED:
            bad = tl.maximum(bad, broken(stored.to(COMPUTE)))
    # Both are divided by the norm above the guard ([PSI] section 6.2).
    guarded = root(square).to(tl.float64) * wide_size > tl.load(h + GUARD)
    back = tl.where(guarded, inverse_root(square), size)
    for k in range(BLOCKS):
        w, g, u, ow, om, mask = piece(source, k, N, BLOCK, COMPUTE, BUFFERED, DIVIDED, SAME, RUN, ALIGN, DIMS_1)
        w, u, stored = moved(
            w, g, u, push, inverse_g, carry.to(COMPUTE), keep, size, inverse_size, STORE, COMPUTE, BUFFERED
        )
        bad = tl.maximum(bad, broken((w * back[:, None]).to(STORE).to(COMPUTE)))
    ok = inside & (bad == 0)
    for k in range(BLOCKS):
        w, g, u, ow, om, mask = piece(source, k, N, BLOCK, COMPUTE, BUFFERED, DIVIDED, SAME, RUN, ALIGN, DIMS_1)
        w, u, stored = moved(
            w, g, u, push, inverse_g, carry.to(COMPUTE), keep, size, inverse_size, STORE, COMPUTE, BUFFERED
        )
        tl.store(source[1] + ow, (w * back[:, None]).to(STORE), mask=mask & ok[:, None])
        if BUFFERED:
            tl.store(source[3] + om, (u * back[:, None]).to(STORE), mask=mask & ok[:, None])
    left = tl.sum((inside & (~ok)).to(tl.int32), 0)
    tl.atomic_add(nonfinite + parameter, left.to(tl.int64), mask=left > 0)
