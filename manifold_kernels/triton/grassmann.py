"""G(1, n), unit rows up to sign: the steps of SGD-G and Adam-G (Cho & Lee 2017)."""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton.addressing import address
from manifold_kernels.triton.arithmetic import divide, inverse_root, power_of_two, root
from manifold_kernels.triton.rows import broken, largest, piece, place
from manifold_kernels.triton.tables import (
    BETA2,
    CLIP,
    EPS,
    FOUND_INF,
    LR,
    MOMENTUM,
    PARAMETER_WIDTH,
    STEPS,
    VARIANCE,
)


@triton.jit
def carried(w, g, u, unit, inverse_g, along, pull, carry):
    """The unit row, and what is carried along the geodesic: ``carry tau + pull h``, ``h = g - w <w, g>``."""
    q = w * unit[:, None]
    rgrad = tl.fma(-along[:, None], q, g * inverse_g[:, None])
    return q, tl.fma(rgrad, pull[:, None], u * carry), rgrad


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
    ADAPTIVE: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of rows of one group."""
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    parameter, component, inside, h, source = place(
        tiles, parameters, axes, groups, components, hyper, STORE, LISTED, SAME, RUN, ALIGN, DIMS_0, LANES
    )
    if DIVIDED:
        if tl.load(h + FOUND_INF) != 0:
            return

    bad = tl.zeros((LANES,), tl.int32)
    top_w = tl.zeros((LANES,), COMPUTE)
    top_g = tl.zeros((LANES,), COMPUTE)
    for k in range(BLOCKS):
        w, g, u, ow, om, mask = piece(source, k, N, BLOCK, COMPUTE, BUFFERED, DIVIDED, SAME, RUN, ALIGN, DIMS_1)
        bad = tl.maximum(bad, tl.maximum(broken(w), tl.maximum(broken(g), broken(u))))
        top_w = tl.maximum(top_w, largest(w))
        top_g = tl.maximum(top_g, largest(g))
    ok = inside & (bad == 0)
    # Divided by powers of two, so that no square overflows; w is normalised first, so that rounding never adds up.
    _, inverse_w = power_of_two(tl.where(ok, top_w, 0.0))
    c_g, inverse_g = power_of_two(tl.where(ok, top_g, 0.0))
    square = tl.zeros((LANES,), COMPUTE)
    for k in range(BLOCKS):
        w, g, u, ow, om, mask = piece(source, k, N, BLOCK, COMPUTE, BUFFERED, DIVIDED, SAME, RUN, ALIGN, DIMS_1)
        q = w * inverse_w[:, None]
        square += tl.sum(q * q, 1)
    unit = inverse_w * inverse_root(square)
    along = tl.zeros((LANES,), COMPUTE)
    for k in range(BLOCKS):
        w, g, u, ow, om, mask = piece(source, k, N, BLOCK, COMPUTE, BUFFERED, DIVIDED, SAME, RUN, ALIGN, DIMS_1)
        along += tl.sum(w * unit[:, None] * (g * inverse_g[:, None]), 1)
    nothing = tl.zeros((LANES,), COMPUTE)
    square = tl.zeros((LANES,), COMPUTE)
    for k in range(BLOCKS):
        w, g, u, ow, om, mask = piece(source, k, N, BLOCK, COMPUTE, BUFFERED, DIVIDED, SAME, RUN, ALIGN, DIMS_1)
        q, c, rgrad = carried(w, g, u, unit, inverse_g, along, nothing, 0.0)
        square += tl.sum(rgrad * rgrad, 1)

    # h <- h min(1, nu/||h||), where h is c_g times what was summed.
    lr = tl.load(h + LR).to(COMPUTE)
    theta = tl.load(h + MOMENTUM)
    carry = theta.to(COMPUTE)
    length = root(square)
    clip = divide(tl.load(h + CLIP).to(COMPUTE) + nothing, tl.where(length > 0, length, 1.0))
    clipped = tl.minimum(c_g, tl.where(length > 0, clip, c_g))
    if ADAPTIVE:
        pull = clipped * (1.0 - theta).to(COMPUTE)
    else:
        pull = -lr * clipped
    square_c = tl.zeros((LANES,), COMPUTE)
    for k in range(BLOCKS):
        w, g, u, ow, om, mask = piece(source, k, N, BLOCK, COMPUTE, BUFFERED, DIVIDED, SAME, RUN, ALIGN, DIMS_1)
        q, c, rgrad = carried(w, g, u, unit, inverse_g, along, pull, carry)
        square_c += tl.sum(c * c, 1)
    norm = root(square_c)
    if ADAPTIVE:
        beta2 = tl.load(h + BETA2)
        tensor = parameters + parameter * PARAMETER_WIDTH
        taken = tl.load(address(tensor + STEPS, tl.int64, False))
        at = tl.load(tensor + VARIANCE).to(tl.pointer_type(COMPUTE)) + component
        v = tl.load(at, mask=inside & (taken > 0), other=0.0)
        size = clipped * length
        v = tl.fma(v, beta2.to(COMPUTE), (1.0 - beta2).to(COMPUTE) * (size * size))
        t = (taken + 1).to(tl.float64)
        correction = tl.sqrt(1.0 - tl.exp(t * tl.log(beta2))) / (1.0 - tl.exp(t * tl.log(theta)))
        factor = divide(-lr * correction.to(COMPUTE) + nothing, root(v + tl.load(h + EPS).to(COMPUTE)))
        tl.store(at, v, mask=ok)
    else:
        factor = nothing + 1.0

    # d = factor c; w <- w cos||d|| + d sinc||d||, tau <- c cos||d|| - sign(factor) ||c|| w sin||d||.
    angle = tl.abs(factor) * norm
    sine, cosine = tl.sin(angle), tl.cos(angle)
    sinc = factor * tl.where(angle > 0, divide(sine, tl.where(angle > 0, angle, 1.0)), 1.0)
    turn = tl.where(factor < 0, -norm, norm) * sine
    square = tl.zeros((LANES,), COMPUTE)
    for k in range(BLOCKS):
        w, g, u, ow, om, mask = piece(source, k, N, BLOCK, COMPUTE, BUFFERED, DIVIDED, SAME, RUN, ALIGN, DIMS_1)
        q, c, rgrad = carried(w, g, u, unit, inverse_g, along, pull, carry)
        y = tl.fma(c, sinc[:, None], q * cosine[:, None])
        square += tl.sum(y * y, 1)
    unit_y = inverse_root(square)
    radial = tl.zeros((LANES,), COMPUTE)
    if BUFFERED:
        # tau loses its component along the new w, which rounding would let grow.
        for k in range(BLOCKS):
            w, g, u, ow, om, mask = piece(source, k, N, BLOCK, COMPUTE, BUFFERED, DIVIDED, SAME, RUN, ALIGN, DIMS_1)
            q, c, rgrad = carried(w, g, u, unit, inverse_g, along, pull, carry)
            y = tl.fma(c, sinc[:, None], q * cosine[:, None]) * unit_y[:, None]
            tau = tl.fma(-turn[:, None], q, c * cosine[:, None])
            radial += tl.sum(y * tau, 1)
    for k in range(BLOCKS):
        w, g, u, ow, om, mask = piece(source, k, N, BLOCK, COMPUTE, BUFFERED, DIVIDED, SAME, RUN, ALIGN, DIMS_1)
        q, c, rgrad = carried(w, g, u, unit, inverse_g, along, pull, carry)
        y = tl.fma(c, sinc[:, None], q * cosine[:, None]) * unit_y[:, None]
        tl.store(source[1] + ow, y.to(STORE), mask=mask & ok[:, None])
        if BUFFERED:
            tau = tl.fma(-turn[:, None], q, c * cosine[:, None])
            tl.store(source[3] + om, tl.fma(-radial[:, None], y, tau).to(STORE), mask=mask & ok[:, None])
    left = tl.sum((inside & (~ok)).to(tl.int32), 0)
    tl.atomic_add(nonfinite + parameter, left.to(tl.int64), mask=left > 0)
