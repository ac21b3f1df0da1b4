"""The step of Stiefel matrices of 9 to 128 rows: a program each, made of matrix products. Never TF32: digits matter."""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton import householder, step_size
from manifold_kernels.triton import momentum as sgd
from manifold_kernels.triton.addressing import address, offsets
from manifold_kernels.triton.arithmetic import divide, finite, power_of_two
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
    TILE_FIRST,
    TILE_GROUP,
    TILE_PARAMETER,
    TILE_PARTIAL,
    TILE_WIDTH,
    WEIGHT,
)


@triton.jit
def product(a, b):
    return tl.dot(a, b, input_precision="ieee", out_dtype=a.dtype)


@triton.jit
def gram(a, b):
    """``A^T B``."""
    return product(tl.trans(a), b)


@triton.jit
def square_norm(a):
    return tl.sum(tl.sum(a * a, 1), 0)


@triton.jit
def identity(SIZE: tl.constexpr, USED: tl.constexpr, COMPUTE: tl.constexpr):
    """The identity of the first ``USED`` of ``SIZE`` dimensions."""
    at = tl.arange(0, SIZE)
    return ((at[:, None] == at[None, :]) & (at < USED)[:, None]).to(COMPUTE)


@triton.jit
def enough(COMPUTE: tl.constexpr):
    """The squared distance from which one quadratically converging iteration leads below eps."""
    return 1e-17 if tl.float64 == COMPUTE else 1e-9


@triton.jit
def newton_qf(y, one):
    """The Q factor from near it, by ``X <- X (I - up(X^T X - I))``, up the strict upper triangle and half the diagonal.

    Every factor is upper triangular with a positive diagonal, so that the limit is qf(Y); the error squares.
    """
    at = tl.arange(0, one.shape[0])
    share = tl.where(at[:, None] < at[None, :], 1.0, tl.where(at[:, None] == at[None, :], 0.5, 0.0)).to(y.dtype)
    distance = tl.sum(tl.sum(one, 1), 0) + 1.0
    rounds = 0
    while (distance > enough(y.dtype)) & (rounds < 12):
        off = gram(y, y) - one
        distance = square_norm(off)
        y = y - product(y, off * share)
        rounds += 1
    return y


@triton.jit
def retract_qr(q, xi, step, N: tl.constexpr, P: tl.constexpr):
    """``qf(q + step xi)``: by products where that is nearly orthonormal, as after any usual step; else by reflections.

    Nearly: ``||Y^T Y - I||_F < 1/4``, from where the distance falls at least by 2 ||.||^2 each time.
    """
    y = q + step * xi
    one = identity(y.shape[1], P, y.dtype)
    if square_norm(gram(y, y) - one) < 0.0625:
        y = newton_qf(y, one)
    else:
        y = tl.reshape(householder.qf(y[None, :, :], P), (y.shape[0], y.shape[1]))
    return y


@triton.jit
def polar(y, P: tl.constexpr):
    """``Y (Y^T Y)^{-1/2}`` by Newton-Schulz iterations ``X <- X (3 I - X^T X)/2``, which need ``||X||_2 < sqrt(3)``."""
    one = identity(y.shape[1], P, y.dtype)
    distance = square_norm(gram(y, y) - one)
    if distance > 0.5:
        y = y * (1.7 / tl.sqrt(square_norm(y)))
    distance = distance * 0.0 + 1.0
    rounds = 0
    while (distance > enough(y.dtype)) & (rounds < 64):
        off = gram(y, y) - one
        distance = square_norm(off)
        y = y - 0.5 * product(y, off)
        rounds += 1
    return y


@triton.jit
def retract_polar(q, xi, step, N: tl.constexpr, P: tl.constexpr):
    return polar(q + step * xi, P)


@triton.jit
def skew_product(x, q):
    """``X Q^T - Q X^T``."""
    outer = product(x, tl.trans(q))
    return outer - tl.trans(outer)


@triton.jit
def inverse_minus_half(b):
    """``(I - B/2)^{-1}`` for a skew B, ``Z = I - B/2``, by Newton's ``X <- X (2 I - Z X)``.

    It starts at ``Z^T/(1 + ||B||_F^2/8)``, where ``||Z||_2^2 <= 1 + ||B||_F^2/8``: eigenvalues come in pairs +-i mu.
    """
    one = identity(b.shape[0], b.shape[0], b.dtype)
    z = one - 0.5 * b
    x = (one + 0.5 * b) * (1.0 / (1.0 + square_norm(b) * 0.125))
    distance = square_norm(b) * 0.0 + 1.0
    rounds = 0
    while (distance > enough(b.dtype)) & (rounds < 40):
        off = one - product(z, x)
        distance = square_norm(off)
        x = x + product(x, off)
        rounds += 1
    return x


@triton.jit
def retract_cayley(q, xi, step, N: tl.constexpr, P: tl.constexpr):
    """``(I - B/2)^{-1} (I + B/2) q``, ``B = P X q^T - q X^T P``, as :mod:`~manifold_kernels.triton.stiefel` has it."""
    x = step * xi
    if N == P:
        a = gram(q, x)
        a = 0.5 * (a - tl.trans(a))
        one = identity(a.shape[0], P, a.dtype)
        y = product(q, product(inverse_minus_half(a), one + 0.5 * a))
    else:
        b = skew_product(x - 0.5 * product(q, gram(q, x)), q)
        y = product(inverse_minus_half(b), q + 0.5 * product(b, q))
    return polar(y, P)


@triton.jit
def retract_exp(q, xi, step, N: tl.constexpr, P: tl.constexpr):
    """``[q X] expm([[A, -X^T X], [I, A]]) [I; 0] expm(-A)``, ``A = q^T X``, as in ``stiefel``."""
    DEGREE: tl.constexpr = 14 if q.dtype == tl.float64 else 8
    x = step * project(q, xi)
    a = gram(q, x)
    a = 0.5 * (a - tl.trans(a))
    sigma = tl.maximum(tl.sqrt(square_norm(x)), 1e-20)
    s = gram(x, x) * (1.0 / sigma)
    turns = tl.ceil(2.0 * (tl.sqrt(square_norm(a)) + sigma))
    part = 1.0 / tl.maximum(turns, 1.0)
    u = identity(a.shape[0], P, a.dtype)
    v = tl.zeros_like(u)
    f = u
    while turns > 0.0:
        du, dv, df = u, v, f
        for k in range(1, DEGREE + 1):
            share = part / k
            du, dv = share * (product(a, du) - product(s, dv)), share * (product(a, dv) + sigma * du)
            df = (share if N == P else -share) * product(a, df)
            u += du
            v += dv
            f += df
        turns -= 1.0
    if N == P:
        y = product(q, f)
    else:
        y = product(product(q, u) + product(x, v) * (1.0 / sigma), f)
    return polar(y, P)


@triton.jit
def project(q, d):
    """``xi = d - q sym(q^T d)`` ([FG] Table VII, corrected)."""
    a = gram(q, d)
    return d - product(q, 0.5 * (a + tl.trans(a)))


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One matrix of a group: momentum, projection, norm, step size, retraction ([FG] Algorithm 1)."""
    tile = tiles + tl.program_id(0) * TILE_WIDTH
    parameter = tl.load(tile + TILE_PARAMETER)
    group = groups + tl.load(tile + TILE_GROUP) * GROUP_WIDTH
    own_axes = axes + tl.load(tile + TILE_AXES) * AXES_WIDTH
    tensor = parameters + parameter * PARAMETER_WIDTH
    h = hyper + tl.load(group + GROUP_HYPER) * HYPER_WIDTH
    if DIVIDED:
        if tl.load(h + FOUND_INF) != 0:
            return

    position = tl.load(tile + TILE_FIRST).to(tl.int32)
    component = tl.load(group + GROUP_FIRST).to(tl.int32) + position
    if LISTED:
        component = tl.load(components + component).to(tl.int32)
    s = tl.load(scales + tl.load(group + GROUP_SCALE) + position * tl.load(group + GROUP_SCALE_STRIDE))
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (column < P)[None, :]
    aw, ag, am = offsets(own_axes, 0, component, DIMS_0, SAME, RUN, ALIGN)
    rw, rg, rm = offsets(own_axes, 1, row, DIMS_1, SAME, RUN, ALIGN)
    cw, cg, cm = offsets(own_axes, 2, column, DIMS_2, SAME, RUN, ALIGN)

    weights = address(tensor + WEIGHT, STORE, RUN >= 0) + aw + (rw[:, None] + cw[None, :])
    grads = address(tensor + GRAD, STORE, RUN >= 0) + ag + (rg[:, None] + cg[None, :])
    buffers = address(tensor + MOMENTUM_BUFFER, STORE, RUN >= 0) + am + (rm[:, None] + cm[None, :])
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
    ok = tl.max(tl.max(bad, 1), 0) == 0
    top = tl.max(tl.max(tl.maximum(tl.abs(g), tl.abs(wide_m)), 1), 0)

    # Divided by a power of two c, so that no square overflows; in units of s.
    c, inverse_c = power_of_two(top)
    q = tl.where(ok, w * (1.0 / s).to(COMPUTE), 0.0)
    d = tl.where(ok, sgd.direction(g, wide_m, theta, inverse_c, BUFFERED, NESTEROV), 0.0)
    xi = project(q, d)
    square = square_norm(xi)
    wide_c = c.to(tl.float64)
    wide = tl.where(ok, square.to(tl.float64) * (wide_c * wide_c), 0.0)
    if MODE == MEASURE:
        tl.store(partials + tl.load(tile + TILE_PARTIAL), wide)
    else:
        r_square = step_size.norm_square(wide, tile, totals, True, MODE)
        if NORMS:
            step_size.write_norms(r_square, ok, position, True, tile, group, norms, INDIVIDUAL, False)
        along = step_size.rate(r_square, h, BOUNDED) * wide_c / s
        along = tl.minimum(along, LONGEST / tl.maximum(tl.sqrt(square).to(tl.float64), 1e-20))
        y = retract(q, xi, -along.to(COMPUTE), N, P)
        moves = inside & ok
        tl.store(weights, (y * s.to(COMPUTE)).to(STORE), mask=moves)
        if BUFFERED:
            tl.store(buffers, m, mask=moves)
        tl.atomic_add(nonfinite + parameter, tl.full((), 1, tl.int64), mask=~ok)
