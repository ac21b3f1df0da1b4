"""The step of Stiefel matrices that are not unrolled, in blocks ``(lanes, rows, columns)``, made of products.

What a lane computes does not depend on its neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton import householder, step_size
from manifold_kernels.triton import momentum as sgd
from manifold_kernels.triton.addressing import address, offsets
from manifold_kernels.triton.arithmetic import divide, finite, power_of_two, root
from manifold_kernels.triton.batched import gram, product, transpose
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
)


@triton.jit
def square_norm(a):
    """``||A||^2`` of every lane."""
    return tl.sum(tl.sum(a * a, 2), 1)


@triton.jit
def spread(lanes):
    """A number of every lane, to be combined with its matrix."""
    return lanes[:, None, None]


@triton.jit
def some(mask):
    """Whether ``mask`` holds on any lane."""
    return tl.max(mask.to(tl.int32), 0) > 0


@triton.jit
def unit(like, USED: tl.constexpr):
    """Identities of as many columns as ``like`` has, the first ``USED`` of them."""
    at = tl.arange(0, like.shape[2])
    one = ((at[:, None] == at[None, :]) & (at < USED)[:, None]).to(like.dtype)
    return tl.broadcast_to(one[None, :, :], (like.shape[0], like.shape[2], like.shape[2]))


@triton.jit
def enough(COMPUTE: tl.constexpr):
    """The squared distance from which one quadratically converging iteration leads below eps."""
    return 1e-17 if tl.float64 == COMPUTE else 1e-9


@triton.jit
def newton_qf(y, moving, N: tl.constexpr, P: tl.constexpr):
    """The Q factor from near it, by ``X <- X (I - up(X^T X - I))``, up the strict upper triangle and half the diagonal.

    Every factor is upper triangular with a positive diagonal, so that the limit is qf(Y); the error squares.
    """
    one = unit(y, P)
    at = tl.arange(0, one.shape[1])
    share = tl.where(at[:, None] < at[None, :], 1.0, tl.where(at[:, None] == at[None, :], 0.5, 0.0)).to(y.dtype)
    rounds = 0
    while some(moving) & (rounds < 12):
        off = gram(y, y, N) - one
        y = tl.where(spread(moving), y - product(y, off * share[None, :, :], P), y)
        moving = moving & (square_norm(off) > enough(y.dtype))
        rounds += 1
    return y


@triton.jit
def retract_qr(q, xi, step, N: tl.constexpr, P: tl.constexpr):
    """``qf(q + step xi)``: by products where that is nearly orthonormal, as after any usual step; else by reflections.

    Nearly: ``||Y^T Y - I||_F < 1/4``, from where the distance falls at least by 2 ||.||^2 each time.
    """
    y = q + spread(step) * xi
    near = square_norm(gram(y, y, N) - unit(y, P)) < 0.0625
    z = newton_qf(y, near, N, P)
    if some(~near):
        z = tl.where(spread(near), z, householder.qf(y, P))
    return z


@triton.jit
def polar(y, N: tl.constexpr, P: tl.constexpr):
    """``Y (Y^T Y)^{-1/2}`` by Newton-Schulz iterations ``X <- X (3 I - X^T X)/2``, which need ``||X||_2 < sqrt(3)``."""
    one = unit(y, P)
    square = square_norm(y)
    far = square_norm(gram(y, y, N) - one) > 0.5
    y = y * spread(tl.where(far, divide(square * 0.0 + 1.7, root(tl.where(far, square, 1.0))), 1.0))
    moving = square == square
    rounds = 0
    while some(moving) & (rounds < 64):
        off = gram(y, y, N) - one
        y = tl.where(spread(moving), y - 0.5 * product(y, off, P), y)
        moving = moving & (square_norm(off) > enough(y.dtype))
        rounds += 1
    return y


@triton.jit
def retract_polar(q, xi, step, N: tl.constexpr, P: tl.constexpr):
    return polar(q + spread(step) * xi, N, P)


@triton.jit
def skew_product(x, q, P: tl.constexpr):
    """``X Q^T - Q X^T``."""
    outer = product(x, transpose(q), P)
    return outer - transpose(outer)


@triton.jit
def inverse_minus_half(b, SIZE: tl.constexpr):
    """``(I - B/2)^{-1}`` for a skew B, ``Z = I - B/2``, by Newton's ``X <- X (2 I - Z X)``.

    It starts at ``Z^T/(1 + ||B||_F^2/8)``, where ``||Z||_2^2 <= 1 + ||B||_F^2/8``: eigenvalues come in pairs +-i mu.
    """
    one = unit(b, SIZE)
    z = one - 0.5 * b
    square = square_norm(b)
    x = (one + 0.5 * b) * spread(divide(square * 0.0 + 1.0, 1.0 + square * 0.125))
    moving = square == square
    rounds = 0
    while some(moving) & (rounds < 40):
        off = one - product(z, x, SIZE)
        x = tl.where(spread(moving), x + product(x, off, SIZE), x)
        moving = moving & (square_norm(off) > enough(b.dtype))
        rounds += 1
    return x


@triton.jit
def skew(a):
    return 0.5 * (a - transpose(a))


@triton.jit
def retract_cayley(q, xi, step, N: tl.constexpr, P: tl.constexpr):
    """``(I - B/2)^{-1} (I + B/2) q``, ``B = P X q^T - q X^T P``, as :mod:`~manifold_kernels.triton.stiefel` has it."""
    x = spread(step) * xi
    if N == P:
        a = skew(gram(q, x, N))
        y = product(q, product(inverse_minus_half(a, P), unit(a, P) + 0.5 * a, P), P)
    else:
        b = skew_product(x - 0.5 * product(q, gram(q, x, N), P), q, P)
        y = product(inverse_minus_half(b, N), q + 0.5 * product(b, q, N), N)
    return polar(y, N, P)


@triton.jit
def retract_exp(q, xi, step, N: tl.constexpr, P: tl.constexpr):
    """``[q X] expm([[A, -X^T X], [I, A]]) [I; 0] expm(-A)``, ``A = q^T X``, as in ``stiefel``."""
    DEGREE: tl.constexpr = 14 if q.dtype == tl.float64 else 8
    x = spread(step) * project(q, xi, N, P)
    a = skew(gram(q, x, N))
    sigma = tl.maximum(root(square_norm(x)), 1e-20)
    inverse = divide(tl.full(sigma.shape, 1.0, sigma.dtype), sigma)
    s = gram(x, x, N) * spread(inverse)
    turns = tl.ceil(2.0 * (root(square_norm(a)) + sigma))
    part = divide(tl.full(sigma.shape, 1.0, sigma.dtype), tl.maximum(turns, 1.0))
    u = unit(a, P)
    v = tl.zeros_like(u)
    f = u
    done = sigma * 0.0
    while some(done < turns):
        du, dv, df = u, v, f
        new_u, new_v, new_f = u, v, f
        for k in range(1, DEGREE + 1):
            share = spread(divide(part, part * 0.0 + k))
            du, dv = (
                share * (product(a, du, P) - product(s, dv, P)),
                share * (product(a, dv, P) + spread(sigma) * du),
            )
            df = (share if N == P else -share) * product(a, df, P)
            new_u += du
            new_v += dv
            new_f += df
        still = spread(done < turns)
        u, v, f = tl.where(still, new_u, u), tl.where(still, new_v, v), tl.where(still, new_f, f)
        done += 1.0
    if N == P:
        y = product(q, f, P)
    else:
        y = product(product(q, u, P) + product(x, v, P) * spread(inverse), f, P)
    return polar(y, N, P)


@triton.jit
def project(q, d, N: tl.constexpr, P: tl.constexpr):
    """``xi = d - q sym(q^T d)`` ([FG] Table VII, corrected)."""
    a = gram(q, d, N)
    return d - product(q, 0.5 * (a + transpose(a)), P)


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
    retract: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    LONGEST: tl.constexpr,
    STORE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BUFFERED: tl.constexpr,
    NESTEROV: tl.constexpr,
    DIVIDED: tl.constexpr,
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of matrices of one group: momentum, projection, norm, step size, retraction ([FG] Algorithm 1)."""
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
    here = lane < tl.load(tile + TILE_COUNT).to(tl.int32)
    position = tl.load(tile + TILE_FIRST).to(tl.int32) + lane
    component = tl.load(group + GROUP_FIRST).to(tl.int32) + position
    if LISTED:
        component = tl.load(components + component, mask=here, other=0).to(tl.int32)
    s = tl.load(
        scales + tl.load(group + GROUP_SCALE) + position * tl.load(group + GROUP_SCALE_STRIDE), mask=here, other=1.0
    )
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = spread(here) & ((row < N)[:, None] & (column < P)[None, :])[None, :, :]
    aw, ag, am = offsets(own_axes, 0, component, DIMS_0, SAME, RUN, ALIGN)
    rw, rg, rm = offsets(own_axes, 1, row, DIMS_1, SAME, RUN, ALIGN)
    cw, cg, cm = offsets(own_axes, 2, column, DIMS_2, SAME, RUN, ALIGN)

    weights = address(tensor + WEIGHT, STORE, RUN >= 0) + (spread(aw) + (rw[:, None] + cw[None, :])[None, :, :])
    grads = address(tensor + GRAD, STORE, RUN >= 0) + (spread(ag) + (rg[:, None] + cg[None, :])[None, :, :])
    buffers = address(tensor + MOMENTUM_BUFFER, STORE, RUN >= 0) + (
        spread(am) + (rm[:, None] + cm[None, :])[None, :, :]
    )
    first_step = tl.load(address(tensor + STEPS, tl.int64, False)) == 0
    theta, keep = sgd.coefficients(h, COMPUTE)
    w = tl.load(weights, mask=inside, other=0.0).to(COMPUTE)
    g = tl.load(grads, mask=inside, other=0.0).to(COMPUTE)
    if DIVIDED:
        g = divide(g, tl.load(h + DIVISOR).to(COMPUTE))
    if BUFFERED:
        old = tl.load(buffers, mask=inside & (~first_step), other=0.0).to(COMPUTE)
        m = sgd.buffer(g, old, first_step, theta, keep, STORE)
    else:
        m = g.to(STORE)
    wide_m = m.to(COMPUTE)
    bad = (~(finite(w) & finite(g) & finite(wide_m))).to(tl.int32)
    ok = here & (tl.max(tl.max(bad, 2), 1) == 0)
    top = tl.max(tl.max(tl.maximum(tl.abs(g), tl.abs(wide_m)), 2), 1)

    # Divided by a power of two c, so that no square overflows; in units of s.
    c, inverse_c = power_of_two(top)
    inverse_s = divide(tl.full((LANES,), 1.0, COMPUTE), s.to(COMPUTE))
    q = tl.where(spread(ok), w * spread(inverse_s), 0.0)
    d = tl.where(spread(ok), sgd.direction(g, wide_m, theta, spread(inverse_c), BUFFERED, NESTEROV), 0.0)
    xi = project(q, d, N, P)
    square = square_norm(xi)
    wide_c = c.to(tl.float64)
    wide = tl.where(ok, square.to(tl.float64) * (wide_c * wide_c), 0.0)
    if MODE == MEASURE:
        tl.store(partials + tl.load(tile + TILE_PARTIAL), tl.sum(wide, 0))
    else:
        r_square = step_size.norm_square(wide, tile, totals, INDIVIDUAL, MODE)
        if NORMS:
            step_size.write_norms(r_square, ok, position, here, tile, group, norms, INDIVIDUAL, False)
        along = step_size.rate(r_square, h, BOUNDED) * wide_c / s
        along = tl.minimum(along, LONGEST / tl.maximum(root(square).to(tl.float64), 1e-20))
        y = retract(q, xi, -along.to(COMPUTE), N, P)
        moves = inside & spread(ok)
        tl.store(weights, (y * spread(s.to(COMPUTE))).to(STORE), mask=moves)
        if BUFFERED:
            tl.store(buffers, m, mask=moves)
        left = tl.sum((here & (~ok)).to(tl.int32), 0)
        tl.atomic_add(nonfinite + parameter, left.to(tl.int64), mask=left > 0)
